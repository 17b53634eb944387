"""A quantized layer against its float layer: signal-to-noise ratio in dB on Gaussian data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import LayerScheme

# bits of weights and activations, bounds at the extremes -> dB that are reached; an output of zeros would have 0
FLOORS = {(2, 2): 0.25, (3, 3): 6.5, (4, 4): 13.5, (6, 6): 26.5, (8, 8): 38.0, (4, 16): 16.0, (16, 4): 16.0, (16, 16): 70.0}


def sqnr(signal: torch.Tensor, output: torch.Tensor) -> float:
    return 10 * torch.log10(signal.pow(2).sum() / (signal - output).pow(2).sum()).item()


@torch.no_grad()
def layer_sqnr(kind: str, scheme: LayerScheme, branch_from_svd: bool = False) -> float:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 48) if kind == "linear" else nn.Conv2d(16, 24, 3, padding=1)
    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / layer.weight[0].numel() ** 0.5)
    x = torch.randn(*((256, 64) if kind == "linear" else (2, 16, 16, 16)), generator=generator)
    expected = layer(x)
    calibrating = (CalibratingLinear if kind == "linear" else CalibratingConv2d).from_layer(layer, scheme)
    if scheme.activation_bits < 16:
        calibrating.input_lower.copy_(x.min())
        calibrating.input_upper.copy_(x.max())
    if branch_from_svd:
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        calibrating.branch_up.copy_(u[:, : scheme.rank] * s[: scheme.rank])
        calibrating.branch_down.copy_(v[: scheme.rank])
        calibrating.set_weight_bounds_to_extremes()
    return sqnr(expected, freeze_layer(calibrating)(x))


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_noise_falls_with_bits(kind: str):
    reached = {bits: layer_sqnr(kind, LayerScheme(*bits, rank=1)) for bits in FLOORS}
    assert all(reached[bits] > floor for bits, floor in FLOORS.items()), reached
    ladder = [reached[b, b] for b in (2, 3, 4, 6, 8, 16)]
    assert ladder == sorted(ladder)
    # 6 dB a bit, as theory has it, once the noise is small
    assert 10 < reached[6, 6] - reached[4, 4] < 14


def test_the_branch_takes_what_quantization_loses():
    plain, with_branch = (layer_sqnr("linear", LayerScheme(4, 16, 32), svd) for svd in (False, True))
    assert with_branch > plain + 2
