"""Quantization of a layer's input in one pass over it: codes, the branch's hidden values and, if asked for, the norm before both.

The input is a picture (B, H, W, C) of any strides, so pictures in channels-first, channels-last or sliced memory are read where
they are; rows are a picture of height 1. Codes and hidden values are written with the channel fastest.

What is written for 2 to 6 bits is the centred code; for 8 bits it is code - 128 (see `triton_epilogue`).

Assumed of the GPU: the contiguous one of pixels and channels is found by the compiler from strides of 1, which are compiled in,
so that reads are coalesced in both memory formats. With a branch a program goes through all channels of its pixels, without it
through one block of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qartsr_pipeline.arithmetic.affine import code_range
from qartsr_pipeline.kernels.triton.numbers import convert, dot_float, round_into
from qartsr_pipeline.kernels.triton.tuning import autotune_quantize, size_class


@triton.jit
def _normalized(values, scale_ptr, shift_ptr, picture, channels, valid, CHANNELS: tl.constexpr, SILU: tl.constexpr):
    """values * scale + shift per channel of this picture, then SiLU if asked for, in float32."""
    offsets = picture * CHANNELS + channels
    scale = tl.load(scale_ptr + offsets, mask=valid, other=0.0)
    shift = tl.load(shift_ptr + offsets, mask=valid, other=0.0)
    values = values * scale[None, :] + shift[None, :]
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    return values


@autotune_quantize(["size_class", "CHANNELS", "RANK"])
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
    picture_stride,
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
    picture = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = pixels < pixels_count
    places = (pixels // width).to(tl.int64) * row_stride + (pixels % width).to(tl.int64) * column_stride
    written = picture * pixels_count + pixels
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
        offsets = (picture * picture_stride + places)[:, None] + (channels.to(tl.int64) * channel_stride)[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
        values = x.to(tl.float32)
        smooth = tl.load(smooth_ptr + channels, mask=valid, other=1.0)
        if norm_scale_ptr is not None:
            values = _normalized(values, norm_scale_ptr, norm_shift_ptr, picture, channels, valid, CHANNELS, SILU)
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


def quantize(
    x: torch.Tensor,
    smooth: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
    bits: int,
    branch_down: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
    norm_shift: torch.Tensor | None = None,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and hidden values of one input.

    The integers are those of `arithmetic.affine.centred_codes` with the multiplier smooth / input_scale; a NaN becomes the zero
    point, so its centred code is 0, and infinities are clipped.

    Args:
        x: (B, H, W, C), float32, float16 or bfloat16, any strides.
        smooth, input_scale, input_zero_point, branch_down: as stored (`docs/stored_format.md`, section 3); several layers that
            share the first three may stack their ``branch_down``, (sum of ranks, C).
        norm_scale, norm_shift: float32 (B, C), contiguous: x * norm_scale + norm_shift is what is quantized, in float32.
        silu: SiLU after that.

    Returns:
        int8 (B, H, W, C), and x's dtype (B, H, W, r), r = 0 without a branch.
    """
    batch, height, width, channels = x.shape
    rank = 0 if branch_down is None else branch_down.shape[0]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    hidden = torch.empty(batch, height, width, rank, dtype=x.dtype, device=x.device)
    if codes.numel() == 0:
        return codes, hidden

    def grid(chosen: dict[str, int]) -> tuple[int, int, int]:
        blocks = 1 if rank else triton.cdiv(channels, chosen["BLOCK_C"])
        return triton.cdiv(height * width, chosen["BLOCK_M"]), blocks, batch

    with torch.cuda.device_of(x):
        _quantize_kernel[grid](
            x,
            smooth,
            input_scale,
            input_zero_point,
            branch_down,
            norm_scale,
            norm_shift,
            codes,
            hidden if rank else None,
            height * width,
            width,
            *x.stride(),
            size_class(height * width),
            CHANNELS=channels,
            RANK=rank,
            HIGHEST=code_range(bits)[1],
            SILU=silu,
            BLOCK_R=max(16, triton.next_power_of_2(rank)),
        )
    return codes, hidden
