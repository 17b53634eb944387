"""Quantization of a layer's input in one pass over it: codes, the branch's hidden values and, if asked for, the norm before both.

The input is (B, H, W, C) of any strides, so feature maps in channels-first, channels-last or sliced memory are read where they
are; rows are a map of height 1. Codes and hidden values are written with the channel fastest.

Assumed of the GPU: of pixels and channels, the compiler finds the contiguous one from strides of 1, which are compiled in, so
that reads are coalesced in both memory formats. With a branch a program goes through all channels of its pixels, without it
through one block of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from qartsr_pipeline.arithmetic.affine import code_range
from qartsr_pipeline.kernels.stored_layer import StoredLayer
from qartsr_pipeline.kernels.tokens import quantized_tokens
from qartsr_pipeline.kernels.triton import interpreted
from qartsr_pipeline.kernels.triton.device_functions import convert, dot_float, round_into

# Block sizes that are tried. One is chosen, by measuring, for a layer's shape and a power of two of rows.
QUANTIZE_CONFIGS = [
    triton.Config({"BLOCK_M": rows, "BLOCK_C": channels}, num_warps=4, num_stages=2)
    for rows, channels in ((128, 32), (64, 64), (32, 64), (32, 128), (16, 128))
]
if interpreted():  # one small configuration: what is proven does not depend on the block size, and nothing can be measured
    QUANTIZE_CONFIGS = [triton.Config({"BLOCK_M": 16, "BLOCK_C": 32})]


@dataclass(frozen=True)
class QuantizedInput:
    """A layer's input as the products read it.

    Attributes:
        codes: int8 (B, H, W, C), contiguous: centred for 2 to 6 bits, code - 128 for 8 bits (see `product`).
        hidden: the branch's hidden values in the input's dtype, (B, H, W, r), contiguous; r = 0 without a branch.
        scales: float32 (B H W,), on the token grid, where 8-bit codes are centred as well; None on the tensor grid.
    """

    codes: torch.Tensor
    hidden: torch.Tensor
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class ChannelNorm:
    """x times scale plus shift, float32 (B, C) each and contiguous, then SiLU if asked for."""

    scale: torch.Tensor
    shift: torch.Tensor
    silu: bool


def size_class(rows: int) -> int:
    """Rows rounded up to a power of two: images of similar size share one choice."""
    return triton.next_power_of_2(rows)


def computable(x: torch.Tensor) -> torch.Tensor:
    """float64 is computed in float32, as the integers are anyway."""
    return x.float() if x.dtype == torch.float64 else x


@triton.jit
def _normalized(values, scale_ptr, shift_ptr, image, channels, valid, CHANNELS: tl.constexpr, SILU: tl.constexpr):
    """values * scale + shift per channel of this image, then SiLU if asked for, in float32."""
    offsets = image * CHANNELS + channels
    scale = tl.load(scale_ptr + offsets, mask=valid, other=0.0)
    shift = tl.load(shift_ptr + offsets, mask=valid, other=0.0)
    values = values * scale[None, :] + shift[None, :]
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    return values


@triton.autotune(QUANTIZE_CONFIGS, ["size_class", "CHANNELS", "RANK"])
@triton.jit
def _quantize_kernel(
    x_ptr,
    smooth_ptr,
    scale_ptr,
    zero_point_ptr,
    down_ptr,
    norm_scale_ptr,
    norm_shift_ptr,
    codes_ptr,
    hidden_ptr,
    pixels_count,
    width,
    image_stride,
    row_stride,
    column_stride,
    channel_stride,
    size_class,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    HIGHEST: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = pixels < pixels_count
    places = (pixels // width).to(tl.int64) * row_stride + (pixels % width).to(tl.int64) * column_stride
    written = image * pixels_count + pixels
    scale = tl.load(scale_ptr)
    zero_point = tl.load(zero_point_ptr).to(tl.float32)
    ranks = tl.arange(0, BLOCK_R)
    hidden = tl.full((BLOCK_M, BLOCK_R), 0.0, tl.float32)

    if RANK > 0:
        first_block = 0
        last_block = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    else:
        first_block = tl.program_id(1)
        last_block = first_block + 1
    for block in range(first_block, last_block):
        channels = block * BLOCK_C + tl.arange(0, BLOCK_C)
        valid = channels < CHANNELS
        mask = exists[:, None] & valid[None, :]
        offsets = (image * image_stride + places)[:, None] + (channels.to(tl.int64) * channel_stride)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        values = x.to(tl.float32)
        smooth = tl.load(smooth_ptr + channels, mask=valid, other=1.0)
        if norm_scale_ptr is not None:
            values = _normalized(values, norm_scale_ptr, norm_shift_ptr, image, channels, valid, CHANNELS, SILU)
        codes = round_into(values * tl.div_rn(smooth, scale)[None, :], -zero_point, HIGHEST - zero_point)
        if HIGHEST == 255:
            codes += zero_point - 128.0
        tl.store(codes_ptr + written[:, None] * CHANNELS + channels[None, :], codes.to(tl.int8), mask=mask)
        if RANK > 0:
            rounded = convert(values, x.dtype).to(tl.float32) * convert(smooth, x.dtype).to(tl.float32)[None, :]
            down_mask = (ranks < RANK)[:, None] & valid[None, :]
            down = tl.load(down_ptr + ranks[:, None] * CHANNELS + channels[None, :], mask=down_mask, other=0.0)
            down = convert(down.to(tl.float32), x.dtype)
            hidden = dot_float(convert(rounded, x.dtype), tl.trans(down), hidden)
    if RANK > 0:
        hidden_mask = exists[:, None] & (ranks < RANK)[None, :]
        places_out = hidden_ptr + written[:, None] * RANK + ranks[None, :]
        tl.store(places_out, convert(hidden, hidden_ptr.dtype.element_ty), mask=hidden_mask)


def quantize_tokens(x: torch.Tensor, layer: StoredLayer) -> QuantizedInput:
    """`quantize` on the token grid: the steps are torch's, the same that all backends take."""
    codes, scales = quantized_tokens(x.flatten(0, 2), layer)
    hidden = x.new_empty(*x.shape[:3], 0)
    if layer.spec.rank:
        hidden = F.linear(x * layer.smooth.to(x.dtype), layer.branch_down.to(x.dtype))
    return QuantizedInput(codes.view(x.shape), hidden, scales)


def quantize(x: torch.Tensor, layer: StoredLayer, norm: ChannelNorm | None = None) -> QuantizedInput:
    """Codes and hidden values of a layer's input.

    The integers are those of `arithmetic.affine.centred_codes` with the multiplier smooth / input_scale; a NaN becomes the zero
    point, so its centred code is 0, and infinities are clipped.

    Args:
        x: (B, H, W, C), float32, float16 or bfloat16, any strides.
        norm: applied to x first, in float32.

    Raises:
        ValueError: if x has another number of channels than the layer.
    """
    if layer.spec.grid == "token":
        return quantize_tokens(x, layer)
    batch, height, width, channels = x.shape
    rank, bits = layer.spec.rank, layer.spec.activation_bits
    if channels != layer.spec.in_channels:
        raise ValueError(f"the input has {channels} channels, but the layer takes {layer.spec.in_channels}")
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    hidden = torch.empty(batch, height, width, rank, dtype=x.dtype, device=x.device)
    if codes.numel() == 0:
        return QuantizedInput(codes, hidden)

    def grid(chosen: dict[str, int]) -> tuple[int, int, int]:
        blocks = 1 if rank else triton.cdiv(channels, chosen["BLOCK_C"])
        return triton.cdiv(height * width, chosen["BLOCK_M"]), blocks, batch

    with torch.cuda.device_of(x):
        _quantize_kernel[grid](
            x,
            layer.smooth,
            layer.input_scale,
            layer.input_zero_point,
            layer.branch_down if rank else None,
            norm.scale if norm else None,
            norm.shift if norm else None,
            codes,
            hidden if rank else None,
            height * width,
            width,
            *x.stride(),
            size_class(height * width),
            CHANNELS=channels,
            RANK=rank,
            HIGHEST=code_range(bits)[1],
            SILU=norm is not None and norm.silu,
            BLOCK_R=max(16, triton.next_power_of_2(rank)),
        )
    return QuantizedInput(codes, hidden)
