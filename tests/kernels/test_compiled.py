"""What numba compiles, against torch's operators."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from deployed_layers import random_layer
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import nn

from qartsr_pipeline.kernels import compiled, compiled_clips, use_backend
from qartsr_pipeline.kernels.compiled import Grid
from qartsr_pipeline.kernels.finite import watched_inputs
from qartsr_pipeline.kernels.tokens import quantized_tokens
from qartsr_pipeline.quantization import fuse as fusing
from qartsr_pipeline.quantization.frames_as_channels import ConvolutionOverFrames, LeanVideoBlock
from qartsr_pipeline.quantization.fuse import convolution_of_normalized
from qartsr_pipeline.quantization.scheme import LayerScheme

numba = pytest.importorskip("numba")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 256, 16), (2, 77, 12), (1, 64, 640)])
@torch.no_grad()
def test_norm_silu_and_codes_are_those_of_the_modules(dtype: torch.dtype, shape: tuple[int, int, int]):
    channels = shape[2]
    norm = nn.GroupNorm(4, channels)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (torch.randn(shape) + 30).to(dtype)  # the mean is large beside the deviation
    scale, shift = compiled.group_scale_shift(x, norm)
    expected = norm.double()(x.double().transpose(1, 2)).transpose(1, 2)
    normal = x.double() * scale.double()[:, None] + shift.double()[:, None]
    assert (normal - expected).abs().max() < 1e-4  # float32 of 30 times the factor
    expected = F.silu(normal).flatten(0, 1)
    multiplier = torch.rand(channels) + 0.5
    for grid in (Grid(multiplier, -7, 8, 7, torch.uint8), Grid(multiplier, -100, 155, 0, torch.float32)):
        codes, kept = compiled.normalize_and_quantize(x, scale, shift, grid, keep=True)
        assert torch.allclose(kept.double(), expected, atol=1e-5, rtol=4e-3 if dtype == torch.bfloat16 else 1e-5)
        product = expected * multiplier
        certain = ((product - product.floor() - 0.5).abs() > 1e-3) | (product.abs() > 200)  # not near a tie
        exact = product.round().clamp(grid.low, grid.high) + grid.offset
        assert certain.double().mean() > 0.9 and torch.equal(codes.double()[certain], exact[certain])
        again, none = compiled.normalize_and_quantize(x, scale, shift, grid, keep=False)
        assert none is None and torch.equal(again, codes)


@torch.no_grad()
def test_threads_change_nothing(monkeypatch):
    norm, x = nn.GroupNorm(2, 16), torch.randn(2, 1001, 16)
    grid = Grid(torch.ones(16), -7, 8, 7, torch.uint8)

    scale, shift = compiled.group_scale_shift(x, norm)

    def results() -> list[torch.Tensor]:
        codes = [compiled.quantize(x[0], grid), *compiled.normalize_and_quantize(x, scale, shift, grid, True)]
        return [*compiled.group_scale_shift(x, norm), *codes]

    alone = results()
    monkeypatch.setattr(compiled, "FEWEST_FOR_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    divided = results()
    assert torch.allclose(alone[0], divided[0]) and torch.allclose(alone[1], divided[1], atol=1e-6)
    assert all(torch.equal(one, other) for one, other in zip(alone[2:], divided[2:], strict=True))


@pytest.mark.skipif(sys.platform == "win32", reason="no fork there")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not(monkeypatch):
    monkeypatch.setattr(compiled, "FEWEST_FOR_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, grid = torch.randn(1001, 16), Grid(torch.ones(16), -7, 8, 7, torch.uint8)
    expected = compiled.quantize(x, grid)
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(not torch.equal(compiled.quantize(x, grid), expected))
    assert os.waitpid(child, 0)[1] == 0


def test_why_numba_is_of_no_use_is_said(monkeypatch, caplog):
    assert compiled.unavailable() is None
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    compiled._loaded.cache_clear()
    try:
        assert not compiled.works() and "NUMBA_DISABLE_JIT" in compiled.unavailable() and "take longer" in caplog.text
        monkeypatch.setattr(compiled, "find_spec", lambda name: None)
        compiled._loaded.cache_clear()
        assert not compiled.works() and "qartsr[fast]" in compiled.unavailable()
    finally:
        compiled._loaded.cache_clear()


@pytest.mark.parametrize("backend", ["onednn", "float"])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_convolution_takes_the_norm_before_it_along(backend: str, rank: int, batch: int, monkeypatch):
    norm, layer = nn.GroupNorm(4, 16), random_layer(nn.Conv2d(16, 8, 3, padding=1), LayerScheme(4, 8, rank))
    x, residual = torch.randn(batch, 16, 9, 7) + 1, torch.randn(batch, 8, 9, 7)
    monkeypatch.setattr(fusing, "norm_fusion", lambda x, layer: None)
    expected = convolution_of_normalized(x, norm, layer, lambda: residual)
    monkeypatch.undo()
    with use_backend(backend):
        y = convolution_of_normalized(x, norm, layer, lambda: residual)
    assert (y - expected).norm() < 1e-3 * expected.norm()


def test_nan_is_noticed_and_other_channels_are_refused():
    norm, grid = nn.GroupNorm(2, 4), Grid(torch.ones(4), 0, 15, 0, torch.uint8)
    x = torch.ones(1, 8, 4)
    for wrong in (float("nan"), float("inf")):
        x[0, 3, 1] = wrong
        assert not compiled.group_scale_shift(x, norm)[1].isfinite().all()
    for shape in ((8, 3), (8, 5)):
        with pytest.raises(RuntimeError, match="other channels"):
            compiled.quantize(torch.ones(shape), grid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rotation", "exponents"), [(0, False), (0, True), (16, True), (64, False), (256, False)])
@torch.no_grad()
def test_tokens_have_the_same_codes_and_scales(dtype: torch.dtype, rotation: int, exponents: bool, monkeypatch):
    scheme = LayerScheme(4, 6 if exponents else 4, 0, "token", rotation, exponents)
    layer = random_layer(nn.Linear(512, 8), scheme)
    x = torch.randn(70, 512) * torch.exp(2 * torch.randn(70, 1)) * torch.rand(512)
    x[1], x[2], x[3, 5], x[4, 6], x[5, 7] = 0, x[2] * 1e-38, float("nan"), float("inf"), -float("nan")
    x = x.to(dtype)
    assert compiled_clips.can_run_tokens(x, layer.spec.rotation)
    found = quantized_tokens(x, layer)
    monkeypatch.setattr(compiled, "FEWEST_FOR_THREADS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    divided = quantized_tokens(x, layer)
    monkeypatch.undo()
    monkeypatch.setattr(compiled, "works", lambda: False)
    expected = quantized_tokens(x, layer)
    for codes in (found, divided):
        assert torch.equal(codes.codes, expected.codes)
        assert torch.equal(codes.scales.view(torch.int32)[6:], expected.scales.view(torch.int32)[6:])
        assert torch.equal(codes.scales.isfinite(), expected.scales.isfinite()) and not codes.scales[3:6].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_linear_layer_of_tokens_is_the_same_bit_for_bit(dtype: torch.dtype, rank: int, bias: bool, monkeypatch):
    layer, x = random_layer(nn.Linear(64, 24, bias=bias), LayerScheme(4, 4, rank, "token", 64)), torch.randn(300, 64).to(dtype)
    x[1, 3] = float("nan")
    found = layer(x)
    monkeypatch.setattr(compiled, "works", lambda: False)
    expected = layer(x)
    assert not found[1].isfinite().any() and torch.equal(found[2:], expected[2:]) and torch.equal(found[0], expected[0])


def test_tokens_of_other_channels_are_refused():
    layer = random_layer(nn.Linear(64, 24), LayerScheme(4, 4, 0, "token"))
    with pytest.raises(RuntimeError, match="other channels"):
        quantized_tokens(torch.ones(3, 65), layer)


def quantized_video_block(inputs: int, outputs: int) -> WanResidualBlock:
    block = WanResidualBlock(inputs, outputs)
    for norm in (block.norm1, block.norm2):
        nn.init.uniform_(norm.gamma, 0.5, 1.5)
    for name in ("conv1", "conv2"):
        over = ConvolutionOverFrames(getattr(block, name))
        over.conv = random_layer(over.conv, LayerScheme(8, 8, 0), exact_scales=True)
        setattr(block, name, over)
    return block


def streamed(block: nn.Module, groups: list[torch.Tensor]) -> torch.Tensor:
    cache, parts = [None, None], []
    for group in groups:
        parts.append(block(group, feat_cache=cache, feat_idx=[0]))
    assert all(kept.shape[2] <= 2 for kept in cache)
    return torch.cat(parts, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["onednn", "float"])
@pytest.mark.parametrize("channels", [(24, 24), (16, 40)])
@torch.no_grad()
def test_a_block_of_the_video_autoencoder_in_one_pass(dtype, backend: str, channels: tuple[int, int], monkeypatch):
    block = quantized_video_block(*channels)
    floats = (block.norm1, block.norm2, block.conv_shortcut)
    for module in floats:
        module.to(dtype)
    lean, x = LeanVideoBlock(block), 3 * torch.randn(1, channels[0], 8, 9, 7).to(dtype)
    sizes = [1, 1, 2, 4]
    with use_backend(backend):
        found, whole = streamed(lean, list(x.split(sizes, 2))), lean(x)
        for module in floats:
            module.float()
        exact = streamed(block, list(x.float().split(sizes, 2)))
        monkeypatch.setattr(compiled, "works", lambda: False)
        assert torch.equal(streamed(LeanVideoBlock(block), list(x.float().split(sizes, 2))), exact)
    assert torch.equal(found, whole) or backend == "float"  # in which sums of floats depend on how many there are
    assert found.dtype == dtype and found.shape == exact.shape
    assert (found.float() - exact).norm() < (3e-3 if dtype == torch.float32 else 3e-2) * exact.norm()


@torch.no_grad()
def test_what_is_not_finite_in_a_frame_is_noticed():
    lean, x = LeanVideoBlock(quantized_video_block(16, 16)), torch.randn(1, 16, 2, 4, 4)
    for value, finite in ((1.0, True), (float("nan"), False), (float("inf"), False)):
        x[0, 3, 1, 2, 2] = value
        with watched_inputs() as watch:
            lean(x)
        assert watch.all_finite() == finite
