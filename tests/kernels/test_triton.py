"""The Triton kernels against the reference: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from deployed_layers import random_layer
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from benchmarks.triton_gpu_check import LEAST_DECIBELS, decibels, hard_values, quantized, quantizer_is_exact
from qartsr_pipeline.arithmetic.affine import BITS, centred_codes
from qartsr_pipeline.image.tile_statistics import SharedStatistics
from qartsr_pipeline.kernels import BACKENDS, LayerSpec, use_backend
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.fuse import LeanResnetBlock
from qartsr_pipeline.quantization.scheme import LayerScheme
from qartsr_pipeline.versions import release

TRITON, REFERENCE = BACKENDS["triton"], BACKENDS["reference"]
ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed"),
    pytest.mark.skipif(
        find_spec("triton") is not None and not ON_GPU and release("triton") < (3, 4),
        reason="triton before 3.4 needs a GPU for autotuned kernels, in its interpreter, too",
    ),
]
DEVICE = "cuda" if ON_GPU else "cpu"
BIT_PAIRS = [(2, 2), (3, 4), (4, 6), (6, 3), (8, 8), (3, 8), (8, 2)]  # every width of either, and mixtures


@pytest.fixture(autouse=True)
def _interpreted_without_a_gpu(monkeypatch):
    if not ON_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with torch.no_grad():
        yield


def layer_of(float_layer: nn.Module, *scheme: Any, seed: int = 0) -> DeployedLayer:
    return random_layer(float_layer, LayerScheme(*scheme), seed).to(DEVICE)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def assert_close(y: torch.Tensor, expected: torch.Tensor) -> None:
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert decibels(y, expected) >= LEAST_DECIBELS[y.dtype]


@pytest.mark.parametrize("bits", BIT_PAIRS)
@pytest.mark.parametrize("channels", [32, 13])
def test_bits_and_dtypes(bits: tuple[int, int], channels: int):
    """32 channels take the fast form of unpacking, 13 the slow one."""
    half = (torch.bfloat16, torch.float16)[(BIT_PAIRS.index(bits) + channels) % 2]
    for rank, dtype in ((0, torch.float32), (3, half)):
        layer, x = layer_of(nn.Linear(channels, 17), *bits, rank), inputs(3, 7, channels, dtype=dtype)
        assert_close(TRITON.linear(x, layer), REFERENCE.linear(x, layer))
        layer, x = layer_of(nn.Conv2d(channels, 5, 3, padding=1), *bits, rank), inputs(1, channels, 4, 5, dtype=dtype)
        assert_close(TRITON.conv2d(x, layer), REFERENCE.conv2d(x, layer))


@pytest.mark.parametrize("bits", [(4, 4), (6, 6), (8, 8), (8, 4)])
@pytest.mark.parametrize("channels", [64, 13])
def test_the_token_grid(bits: tuple[int, int], channels: int):
    for rank, exponents, dtype in ((0, True, torch.float32), (3, False, torch.bfloat16)):
        layer, x = layer_of(nn.Linear(channels, 17), *bits, rank, "token", 32, exponents), inputs(3, 7, channels, dtype=dtype)
        x *= torch.linspace(0.01, 30, 21, device=x.device).view(3, 7, 1).to(dtype)
        assert_close(TRITON.linear(x, layer), REFERENCE.linear(x, layer))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", LEAST_DECIBELS)
def test_integers_into_the_product_are_identical(bits: int, dtype: torch.dtype):
    """Ties between two codes, NaN and infinities included."""
    for channels in (32, 13):
        layer = layer_of(nn.Linear(channels, 4), 4, bits, 0, seed=bits)
        assert quantizer_is_exact(hard_values(layer, dtype), layer)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [(3, 2, 1), (3, 2, 0), (1, 1, 0), (1, 2, 0), (1, 1, 1), ((1, 3), (2, 1), (0, 2)), (5, 1, 2)],
)
def test_geometries(kernel, stride, padding):
    for bits in ((4, 4), (4, 8)):
        layer = layer_of(nn.Conv2d(6, 18, kernel, stride, padding), *bits, 2)
        x = inputs(2, 6, 5, 4)
        assert_close(TRITON.conv2d(x, layer), REFERENCE.conv2d(x, layer))


def test_more_blocks_than_one_in_every_direction():
    layer, x = layer_of(nn.Conv2d(96, 40, 3, padding=1, bias=False), 3, 4, 20), inputs(1, 96, 5, 8)
    assert_close(TRITON.conv2d(x, layer), REFERENCE.conv2d(x, layer))


def test_memory_formats():
    layer = layer_of(nn.Conv2d(6, 5, 3, padding=1), 4, 4, 2)
    x = inputs(2, 6, 5, 7)
    expected = REFERENCE.conv2d(x, layer)
    sliced = torch.cat([x, x], 1)[:, :6]
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for same in (x, x.to(memory_format=torch.channels_last), sliced, turned):
        assert_close(TRITON.conv2d(same, layer), expected)
    layer, x = layer_of(nn.Linear(6, 5), 4, 4, 2), inputs(6, 3, 4).permute(2, 1, 0)
    assert_close(TRITON.linear(x, layer), REFERENCE.linear(x, layer))


def test_empty_batches():
    assert TRITON.linear(inputs(0, 4, 6), layer_of(nn.Linear(6, 5), 4, 8, 2)).shape == (0, 4, 5)
    assert TRITON.conv2d(inputs(0, 6, 4, 4), layer_of(nn.Conv2d(6, 5, 3), 4, 8, 2)).shape == (0, 5, 2, 2)


def test_an_image_smaller_than_the_kernel_is_refused():
    with pytest.raises(ValueError, match="2 x 4 is too small for a kernel"):
        TRITON.conv2d(inputs(1, 6, 2, 4), layer_of(nn.Conv2d(6, 5, 3), 4, 4, 0))


def test_nan_and_infinity_stay_where_they_are():
    """Without a branch they are codes like others; every pixel is what the reference gives."""
    layer, x = layer_of(nn.Conv2d(6, 5, 3, padding=1), 4, 4, 0), inputs(1, 6, 5, 5)
    x[0, 0, 0, 0], x[0, 1, 2, 2], x[0, 2, 4, 4] = float("nan"), float("inf"), -float("inf")
    y = TRITON.conv2d(x, layer)
    assert torch.isfinite(y).all()
    assert_close(y, REFERENCE.conv2d(x, layer))


@pytest.mark.parametrize("dtype", [*LEAST_DECIBELS, torch.float64])
@pytest.mark.parametrize("kernel", [3, 1])
def test_a_residual_is_added(kernel: int, dtype: torch.dtype):
    layer, x = layer_of(nn.Conv2d(6, 5, kernel, padding=kernel // 2), 4, 4, 2), inputs(2, 6, 3, 4, dtype=dtype)
    residual, scale, shift = inputs(2, 5, 3, 4, dtype=dtype), torch.ones(2, 6, device=DEVICE), torch.zeros(2, 6, device=DEVICE)
    y = TRITON.norm_conv2d(x, scale, shift, layer, silu=False, residual=residual)
    assert y.dtype == dtype and decibels(y, REFERENCE.conv2d(x, layer) + residual) >= LEAST_DECIBELS.get(dtype, 100)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", LEAST_DECIBELS)
def test_codes_of_normalized_values(silu: bool, dtype: torch.dtype):
    """Each is the reference's; where rounding of exponential or sum moves a value across a tie, the next one."""
    from qartsr_pipeline.kernels.triton.quantize import ChannelNorm

    layer, x = layer_of(nn.Conv2d(6, 5, 3), 8, 8, 0), inputs(2, 24, 24, 6, dtype=dtype)
    scale, shift = 1 + inputs(2, 6).square(), inputs(2, 6)
    codes = quantized(x, layer, ChannelNorm(scale, shift, silu)).codes
    values = x.float() * scale[:, None, None] + shift[:, None, None]
    values = nn.functional.silu(values) if silu else values
    expected = centred_codes(values, layer.smooth / layer.input_scale, layer.input_zero_point.float(), 8)
    off = (codes.float() + 128 - layer.input_zero_point - expected).abs()
    assert off.max() <= 1 and off.mean() < 1e-3


@pytest.mark.parametrize("silu", [True, False])
def test_norm_and_silu_in_the_quantizing_pass(silu: bool):
    """Float32 sums in another order move a value across a tie now and then; nothing else may differ."""
    norm = nn.GroupNorm(2, 6, eps=1e-4).to(DEVICE)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = 3 * inputs(2, 6, 5, 7) + 50  # a mean far from 0: sums of squares would cancel
    scale, shift = TRITON.group_scale_shift(x, norm)
    assert torch.allclose(x * scale[:, :, None, None] + shift[:, :, None, None], norm(x), atol=2e-4)
    layer = layer_of(nn.Conv2d(6, 5, 3, padding=1), 8, 8, 2)
    between = norm(x)
    expected = REFERENCE.conv2d(nn.functional.silu(between) if silu else between, layer)
    assert decibels(TRITON.norm_conv2d(x, scale, shift, layer, silu), expected) > 45


def test_fused_blocks_take_the_norm_into_the_pass(monkeypatch):
    block = LeanResnetBlock(ResnetBlock2D(in_channels=6, out_channels=6, temb_channels=None, groups=2, eps=1e-4)).to(DEVICE)
    block.conv1, block.conv2 = (layer_of(nn.Conv2d(6, 6, 3, padding=1), 8, 8, 2, seed=seed) for seed in range(2))
    x = inputs(1, 6, 5, 7)
    with use_backend("reference"):
        expected = block(x)
    statistics, pair = SharedStatistics([block], rim=0), inputs(2, 6, 3, 4)
    with statistics.record():
        block(x)
    with statistics.apply(), use_backend("reference"):
        of_pair = block(pair)
    monkeypatch.setattr(nn.GroupNorm, "forward", None)
    with use_backend("triton"):
        assert decibels(block(x), expected) > 40
        with statistics.apply():
            assert all(decibels(*pictures) > 40 for pictures in zip(block(pair), of_pair, strict=True))


def test_constraints():
    spec = LayerSpec("linear", 4, 4, 0, 8, 8)
    assert TRITON.unavailable() is None and TRITON.unsupported(spec, DEVICE) is None
    assert "16 bits" in TRITON.unsupported(LayerSpec("linear", 16, 4, 0, 8, 8), DEVICE)
    assert "does not run on mps" in TRITON.unsupported(spec, "mps")


@pytest.mark.skipif(ON_GPU, reason="this machine has a GPU that Triton compiles for")
def test_without_a_gpu_and_without_the_interpreter_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert TRITON.unavailable() is not None
