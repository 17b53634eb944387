"""Winograd's convolution of integers, and where it is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from deployed_layers import random_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qartsr_pipeline.arithmetic.affine import BITS
from qartsr_pipeline.kernels import BACKENDS, LayerSpec, choose_backend, low_memory, use_backend
from qartsr_pipeline.kernels.codes import weight_bytes
from qartsr_pipeline.kernels.cpu import OneDNN
from qartsr_pipeline.kernels.winograd import LONGEST_SUM
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.scheme import LayerScheme

WINOGRAD = BACKENDS["winograd"]
pytestmark = pytest.mark.skipif(WINOGRAD.unavailable() is not None, reason="needs numba and an x86 processor")
SPEC = LayerSpec("conv2d", 8, 8, 0, 64, 64, (3, 3), (1, 1), (1, 1))


def compute(layer: DeployedLayer, x: torch.Tensor, backend: str = "winograd") -> torch.Tensor:
    with use_backend(backend), torch.no_grad():
        return layer(x)


def exact(layer: DeployedLayer, x: torch.Tensor) -> torch.Tensor:
    """The layer's output without a branch, in float64, in which sums of integers are exact."""
    spec, zero = layer.spec, int(layer.input_zero_point)
    codes = torch.round(x * (layer.smooth / layer.input_scale).view(-1, 1, 1)).clamp(-zero, 2**spec.activation_bits - 1 - zero)
    sums = nn.functional.conv2d(codes.double(), weight_bytes(layer).double(), padding=spec.padding)
    y = sums * (layer.weight_scale * layer.input_scale).double().view(-1, 1, 1)
    return y if layer.bias is None else y + layer.bias.double().view(-1, 1, 1)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_sums_are_exact(data: st.DataObject):
    """With scales that are powers of two, outputs are the sums of integers, rounded once where these have more than 24 bits."""

    def pick(*choices):
        return data.draw(st.sampled_from(choices))

    scheme = LayerScheme(pick(*BITS), pick(*BITS))
    layer = nn.Conv2d(pick(16, 18, 24, 34, 64), pick(16, 18, 32, 46), 3, padding=pick(0, 1, 2, (0, 2), (3, 1)), bias=False)
    deployed = random_layer(layer, scheme, seed := data.draw(st.integers(0, 1000)), exact_scales=True)
    height, width = data.draw(st.integers(3, 13)), data.draw(st.integers(3, 60))
    x = 3 * torch.randn(pick(1, 2), layer.in_channels, height, width, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(compute(deployed, x), exact(deployed, x).float())


@pytest.mark.parametrize("zero_point", [0, 128, 255])
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("sign", [-1, 1])
def test_codes_at_their_extremes_do_not_overflow(zero_point: int, weight: int, sign: int):
    """Also of alternating signs, where transformed tiles are largest, with as many channels as are allowed."""
    channels = LONGEST_SUM // 9 // 2 * 2
    layer = random_layer(nn.Conv2d(channels, 16, 3, padding=1, bias=False), LayerScheme(8, 8), exact_scales=True)
    assert layer.spec.in_channels * 9 > LONGEST_SUM - 18
    layer.weight_packed.fill_(weight % 256)
    layer.input_zero_point.fill_(zero_point)
    x = torch.full((1, channels, 5, 6), sign * 1e9)
    checkered = x * (-1) ** (torch.arange(5)[:, None] + torch.arange(6))
    for one in (x, checkered, x * (-1) ** torch.arange(6)):
        assert torch.equal(compute(layer, one), exact(layer, one).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 1, 8])
def test_outputs_agree_with_the_reference(rank: int, dtype: torch.dtype):
    layer = random_layer(nn.Conv2d(32, 48, 3, padding=1), LayerScheme(8, 8, rank))
    for shape in ((2, 32, 9, 31), (32, 1, 1), (0, 32, 4, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        y, expected = compute(layer, x), compute(layer, x, "reference")
        assert y.shape == expected.shape and y.dtype == dtype
        assert torch.allclose(
            y, expected, rtol=0, atol=float(expected.abs().amax() if x.numel() else 0) * {4: 1e-6}.get(y.itemsize, 0.02)
        )


def test_the_threads_share_the_rows(monkeypatch):
    layer = random_layer(nn.Conv2d(24, 40, 3, padding=1), LayerScheme(8, 8))
    x = torch.randn(2, 24, 23, 19)
    expected = compute(layer, x)
    for threads in (2, 3, 50):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert torch.equal(compute(layer, x), expected)


def test_nothing_is_kept_of_weights_that_are_stored_as_bytes():
    layer, x = random_layer(nn.Conv2d(16, 16, 3), LayerScheme(8, 8)), torch.randn(1, 16, 8, 8)
    expected = compute(layer, x)
    assert layer.prepared.bytes < 1000 < layer.weight_packed.numel()
    layer.prepared.clear()
    with low_memory():
        assert torch.equal(compute(layer, x), expected) and layer.prepared.bytes == 0


@pytest.fixture
def without_vnni(monkeypatch, forget_choices) -> None:
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    monkeypatch.setattr(OneDNN, "constraints", tuple(replace(one, has_vnni=lambda: False) for one in OneDNN.constraints))
    forget_choices()


def test_it_is_chosen_without_vnni_for_the_layers_that_it_is_made_for(without_vnni, caplog):
    def chosen(**changes) -> str:
        return choose_backend(replace(SPEC, **changes), "cpu").name

    assert chosen() == chosen(in_channels=1280) == chosen(weight_bits=4, activation_bits=4) == "winograd"
    assert chosen(weight_bits=4, activation_bits=4, out_channels=640) == "onednn"
    assert not caplog.messages  # nothing slower was chosen
    for other in ({"stride": (2, 2)}, {"kernel_size": (1, 1)}, {"in_channels": 3}, {"out_channels": 17}, {"in_channels": 2560}):
        assert chosen(**other) == "float"


@pytest.mark.skipif(BACKENDS["onednn"].unavailable() is not None, reason="this build of torch has no oneDNN")
def test_with_vnni_it_is_used_only_when_asked_for(monkeypatch, forget_choices):
    monkeypatch.setattr(OneDNN, "constraints", tuple(replace(one, has_vnni=lambda: True) for one in OneDNN.constraints))
    assert choose_backend(SPEC, "cpu").name == "onednn"
    with use_backend("winograd"):
        assert choose_backend(SPEC, "cpu").name == "winograd"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kernel_size": (1, 1)}, "the kernel size is 1 x 1, not 3 x 3"),
        ({"stride": (2, 1)}, "the stride is 2 x 1, not 1 x 1"),
        ({"in_channels": 8}, "8 inputs and 64 outputs are not both 16 or more"),
        ({"in_channels": 2560}, "an output sums 23040 products, more than"),
        ({"kind": "linear"}, "linear layers are not supported"),
    ],
)
def test_it_says_which_layers_it_refuses(changes: dict, reason: str):
    with use_backend("winograd"), pytest.raises(RuntimeError, match=reason):
        choose_backend(replace(SPEC, **changes), "cpu")
