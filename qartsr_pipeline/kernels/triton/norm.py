"""Statistics of a GroupNorm, as one factor and one summand per image and channel, which `quantize` applies as it
quantizes.

Two kernels. The first takes mean and sum of squared deviations of every channel over a block of pixels, which stays in registers
between the two; the second puts the blocks and a group's channels together by

    mean = sum(n_i mean_i) / n        M2 = sum(M2_i + n_i (mean_i - mean)^2)        (Chan, Golub and LeVeque 1979)

No sum of squares is ever taken of values that still have their mean in them, so nothing cancels. All in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import nn

from qartsr_pipeline.kernels.triton import interpreted
from qartsr_pipeline.kernels.triton.quantize import computable

PIXEL_BLOCK, CHANNEL_BLOCK = (16, 16) if interpreted() else (128, 32)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _block_kernel(
    x_ptr,
    means_ptr,
    deviations_ptr,
    pixels_count,
    width,
    image_stride,
    row_stride,
    column_stride,
    channel_stride,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixels < pixels_count)[:, None] & (channels < CHANNELS)[None, :]
    places = (pixels // width).to(tl.int64) * row_stride + (pixels % width).to(tl.int64) * column_stride
    offsets = (image * image_stride + places)[:, None] + (channels.to(tl.int64) * channel_stride)[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(pixels_count - tl.program_id(0) * BLOCK_M, BLOCK_M).to(tl.float32)
    means = tl.reduce(x, 0, _add) / count
    deviations = tl.where(mask, x - means[None, :], 0.0)
    out = (image * tl.num_programs(0) + tl.program_id(0)) * CHANNELS + channels
    tl.store(means_ptr + out, means, mask=channels < CHANNELS)
    tl.store(deviations_ptr + out, tl.reduce(deviations * deviations, 0, _add), mask=channels < CHANNELS)


@triton.jit
def _group_kernel(
    means_ptr,
    deviations_ptr,
    gamma_ptr,
    beta_ptr,
    scale_ptr,
    shift_ptr,
    pixels_count,
    blocks_count,
    epsilon,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One group of one image; GROUP is its channels, PIXELS the pixels of a whole block of `_block_kernel`."""
    inner = tl.arange(0, BLOCK_C)
    channels = tl.program_id(0) * GROUP + inner
    first = tl.program_id(1).to(tl.int64) * blocks_count
    size = pixels_count.to(tl.float32) * GROUP

    total = tl.full((BLOCK_C,), 0.0, tl.float32)
    for start in range(0, blocks_count, BLOCK_T):
        blocks = start + tl.arange(0, BLOCK_T)
        mask = (blocks < blocks_count)[:, None] & (inner < GROUP)[None, :]
        means = tl.load(means_ptr + (first + blocks)[:, None] * CHANNELS + channels[None, :], mask=mask, other=0.0)
        counts = tl.minimum(pixels_count - blocks * PIXELS, PIXELS).to(tl.float32)
        total += tl.reduce(means * counts[:, None], 0, _add)
    mean = tl.reduce(total, 0, _add) / size

    total = tl.full((BLOCK_C,), 0.0, tl.float32)
    for start in range(0, blocks_count, BLOCK_T):
        blocks = start + tl.arange(0, BLOCK_T)
        mask = (blocks < blocks_count)[:, None] & (inner < GROUP)[None, :]
        offsets = (first + blocks)[:, None] * CHANNELS + channels[None, :]
        away = tl.load(means_ptr + offsets, mask=mask, other=0.0) - mean
        counts = tl.minimum(pixels_count - blocks * PIXELS, PIXELS).to(tl.float32)
        inside = tl.load(deviations_ptr + offsets, mask=mask, other=0.0)
        total += tl.reduce(tl.where(mask, inside + counts[:, None] * away * away, 0.0), 0, _add)
    factor = 1.0 / tl.sqrt_rn(tl.reduce(total, 0, _add) / size + epsilon)

    exists = inner < GROUP
    scale = factor * tl.load(gamma_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    shift = tl.load(beta_ptr + channels, mask=exists, other=0.0).to(tl.float32) - mean * scale
    out = tl.program_id(1) * CHANNELS + channels
    tl.store(scale_ptr + out, scale, mask=exists)
    tl.store(shift_ptr + out, shift, mask=exists)


def group_scale_shift(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GroupNorm multiplies every channel of each image of x (B, C, H, W) by, and then adds: float32 (B, C), twice."""
    x = computable(x).permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    pixels, group = height * width, channels // norm.num_groups
    scale, shift = torch.empty(2, batch, channels, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return scale, shift
    blocks = triton.cdiv(pixels, PIXEL_BLOCK)
    means, deviations = torch.empty(2, batch, blocks, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _block_kernel[(blocks, triton.cdiv(channels, CHANNEL_BLOCK), batch)](
            x,
            means,
            deviations,
            pixels,
            width,
            *x.stride(),
            CHANNELS=channels,
            BLOCK_M=PIXEL_BLOCK,
            BLOCK_C=CHANNEL_BLOCK,
            num_warps=4,
        )
        _group_kernel[(norm.num_groups, batch)](
            means,
            deviations,
            norm.weight,
            norm.bias,
            scale,
            shift,
            pixels,
            blocks,
            norm.eps,
            CHANNELS=channels,
            GROUP=group,
            PIXELS=PIXEL_BLOCK,
            BLOCK_T=16 if interpreted() else 64,
            BLOCK_C=triton.next_power_of_2(group),
            num_warps=4,
        )
    return scale, shift
