"""Writes golden/: small layers in the stored format with an example each, files that the format cannot change past unnoticed.

    python tests/quantization/make_golden.py

A directory per layer: ``calibrating.safetensors`` (the layer before freezing), ``deployed.safetensors`` (as a model's file
holds it) and ``example.safetensors`` (input, output); ``layers.json`` states kind, bits and geometry. Files that exist are left
alone: a new format_version adds others, and those of the version before stay as long as that is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from random_layers import random_conv, random_linear, random_token_linear
from safetensors.torch import save_file
from torch import nn

from qartsr_pipeline.arithmetic.token_grid import centred_token_codes
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear, CalibratingMixin
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import SINCE_VERSION_2, LayerScheme
from qartsr_pipeline.quantization.token_layers import TokenLinear

FOLDER = Path(__file__).resolve().parent / "golden"
# No value lies so near to a rounding boundary that another machine's last float digit could move a code.
MARGIN = 1e-4


@dataclass(frozen=True)
class GoldenLayer:
    weight_bits: int
    activation_bits: int
    rank: int
    geometry: dict
    input_shape: tuple[int, ...]
    adapter_rank: int = 1
    grid: tuple[str, int, bool] | None = None  # of version 2: grid, rotation, exponents

    @property
    def scheme(self) -> LayerScheme:
        return LayerScheme(self.weight_bits, self.activation_bits, self.rank, *(self.grid or ()))

    def empty(self) -> CalibratingMixin:
        """A calibrating layer of this kind; its parameters come from the file."""
        geometry = dict(self.geometry)
        sizes = geometry.pop("inputs"), geometry.pop("outputs")
        if "kernel" not in geometry:
            linear = nn.Linear(*sizes, **geometry)
            if not self.grid:
                return CalibratingLinear.from_layer(linear, self.scheme, self.adapter_rank)
            layer = TokenLinear.from_layer(linear, self.scheme, self.adapter_rank)
            layer.train_residual()
            return layer
        kernel = geometry.pop("kernel")
        return CalibratingConv2d.from_layer(nn.Conv2d(*sizes, kernel, **geometry), self.scheme, self.adapter_rank)

    def random(self, seed: int) -> CalibratingMixin:
        make = random_conv if "kernel" in self.geometry else random_token_linear if self.grid else random_linear
        return make(self.scheme, seed, **self.geometry, adapter_rank=self.adapter_rank)


LAYERS = {
    "linear_w4a4_rank2": GoldenLayer(4, 4, 2, {"inputs": 7, "outputs": 6}, (2, 3, 7)),
    "linear_w8a8": GoldenLayer(8, 8, 0, {"inputs": 9, "outputs": 5}, (4, 9), adapter_rank=0),
    "linear_w16a6_no_bias": GoldenLayer(16, 6, 1, {"inputs": 5, "outputs": 4, "bias": False}, (3, 5)),
    "conv_w3a6_stride2": GoldenLayer(
        3, 6, 1, {"inputs": 3, "outputs": 4, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}, (1, 3, 6, 7)
    ),
    "conv_w2a16_uneven": GoldenLayer(
        2, 16, 2, {"inputs": 5, "outputs": 3, "kernel": (1, 3), "stride": (1, 2), "padding": (0, 2)}, (2, 5, 3, 4)
    ),
    "conv_w6a8_pointwise": GoldenLayer(
        6, 8, 0, {"inputs": 7, "outputs": 3, "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0)}, (1, 7, 2, 3)
    ),
    "conv_w8a2_padded": GoldenLayer(
        8, 2, 1, {"inputs": 2, "outputs": 3, "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1)}, (1, 2, 4, 5)
    ),
    "token_w4a4_rotated": GoldenLayer(4, 4, 2, {"inputs": 12, "outputs": 5}, (2, 3, 12), grid=("token", 256, False)),
    "token_w4a4_exponents": GoldenLayer(4, 4, 0, {"inputs": 8, "outputs": 5}, (3, 8), grid=("token", 8, True)),
    "token_w8a6_no_bias": GoldenLayer(8, 6, 1, {"inputs": 7, "outputs": 4, "bias": False}, (3, 7), grid=("token", 0, True)),
}


def distance_to_rounding(values: torch.Tensor) -> float:
    return (values - values.floor() - 0.5).abs().min().item()


@torch.no_grad()
def is_robust(layer: CalibratingMixin, x: torch.Tensor) -> bool:
    distances = []
    if layer.layer_scheme.weight_bits < 16:
        scale, _ = layer.weight_parameters()
        distances.append(distance_to_rounding(layer.residual_weight() / layer._over_outputs(scale)))
        if layer.layer_scheme.weight_bits < 8:
            distances.append(distance_to_rounding(-layer.weight_lower / scale))
    if isinstance(layer, TokenLinear):
        exponents = layer.input_exponents if layer.layer_scheme.exponents else None
        values = layer.transform_rows(x * layer.smooth)
        _, scales = centred_token_codes(values, layer.layer_scheme.activation_bits, exponents)
        distances.append(distance_to_rounding(values / scales / (1.0 if exponents is None else torch.exp2(exponents))))
    elif layer.layer_scheme.activation_bits < 16:
        scale, _ = layer.input_parameters()
        smooth = layer.smooth.view(-1, 1, 1) if x.dim() == 4 else layer.smooth
        distances += [distance_to_rounding(x * smooth / scale), distance_to_rounding(-layer.input_lower / scale)]
    return min(distances) > MARGIN


@torch.no_grad()
def write(name: str, golden: GoldenLayer) -> None:
    for seed in range(1000):
        layer = golden.random(seed)
        x = torch.randn(golden.input_shape, generator=torch.Generator().manual_seed(seed))
        if is_robust(layer, x):
            break
    else:
        raise RuntimeError(f"no seed gives {name} a margin of {MARGIN}")
    deployed = freeze_layer(layer)
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(layer.state_dict()), folder / "calibrating.safetensors")
    save_file({f"layer.{n}": t for n, t in deployed.state_dict().items()}, folder / "deployed.safetensors")
    save_file({"input": x, "output": deployed(x).contiguous()}, folder / "example.safetensors")


def description(golden: GoldenLayer) -> dict:
    geometry = {key: value for key, value in golden.geometry.items() if key != "bias"}
    kind = "conv2d" if "kernel" in geometry else "linear"
    bits = {"weight_bits": golden.weight_bits, "activation_bits": golden.activation_bits, "rank": golden.rank}
    grid = dict(zip(SINCE_VERSION_2, golden.grid, strict=True)) if golden.grid else {}
    return {"kind": kind, **bits, **geometry, **grid}


if __name__ == "__main__":
    for layer_name, golden_layer in LAYERS.items():
        if not (FOLDER / layer_name).exists():
            write(layer_name, golden_layer)
    text = json.dumps({name: description(golden) for name, golden in LAYERS.items()}, indent=2)
    (FOLDER / "layers.json").write_text(text + "\n")
