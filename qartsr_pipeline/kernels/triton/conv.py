"""The convolution's product as an implicit GEMM: int8 codes (B, H, W, C) by packed weights, with its epilogue, in one kernel.

A row of the product is an output pixel, its inner dimension goes through the taps and within a tap through the channels, as the
weights are stored. What lies outside the image is read as the code of zero. The branch is a second, shorter such loop over the
hidden values in 16 bit. All offsets of pixels are 64-bit: 4096 x 4096 x 128 codes do not fit 32.

Assumed of the GPU: as in `product`; neighbouring programs share pixels, and neighbouring taps most of them, through the
cache. ``branch_up`` is read in whatever memory format it lies; with the rank fastest (torch.channels_last) those reads are
coalesced.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qartsr_pipeline.kernels.stored_layer import StoredLayer
from qartsr_pipeline.kernels.triton.device_functions import convert, dot_float, weight_tile
from qartsr_pipeline.kernels.triton.product import (
    autotune_product,
    linear_product,
    outside_code,
    product_arguments,
    product_constants,
    product_grid,
    scaled,
    write_output,
)
from qartsr_pipeline.kernels.triton.quantize import ChannelNorm, QuantizedInput, computable, quantize, size_class


@triton.jit
def _inside(tops, lefts, down, right, height, width):
    """Which pixels' tap (down, right) lies in the image: bool (rows,)."""
    y = tops + down
    x = lefts + right
    return (y >= 0) & (y < height) & (x >= 0) & (x < width)


@autotune_product(["size_class", "OUTPUTS", "CHANNELS", "RANK", "BITS", "ACTIVATION_BITS", "KERNEL_H", "KERNEL_W", "STRIDE_W"])
@triton.jit
def _conv_kernel(
    codes_ptr,
    weight_ptr,
    zero_points_ptr,
    weight_scale_ptr,
    input_scale_ptr,
    input_zero_point_ptr,
    code_sums_ptr,
    hidden_ptr,
    up_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows_count,
    height,
    width,
    out_height,
    out_width,
    up_rank_stride,
    up_tap_stride,
    size_class,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    BITS: tl.constexpr,
    ACTIVATION_BITS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    COLUMN_BLOCKS: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    CHANNEL_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    TAPS: tl.constexpr = KERNEL_H * KERNEL_W
    program = tl.program_id(0)
    rows = (program // COLUMN_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % COLUMN_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = columns % OUTPUTS  # what lies beyond the last output or pixel is computed twice and not written
    pixels = rows % rows_count
    lines = pixels // out_width
    tops = (lines % out_height) * STRIDE_H - PADDING_H
    lefts = (pixels % out_width) * STRIDE_W - PADDING_W
    corners = ((lines // out_height) * height + tops).to(tl.int64) * width + lefts  # may lie outside; then it is not read
    zero_points = None
    if BITS < 8:
        zero_points = tl.load(zero_points_ptr + outputs).to(tl.int8)
    outside = outside_code(input_zero_point_ptr, ACTIVATION_BITS)

    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for step in range(0, TAPS * CHANNEL_BLOCKS):
        tap = step // CHANNEL_BLOCKS
        block = step % CHANNEL_BLOCKS
        down = tap // KERNEL_W
        right = tap % KERNEL_W
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        places = (corners + (down * width + right)) * CHANNELS
        mask = _inside(tops, lefts, down, right, height, width)[:, None]
        if not ALIGNED:
            mask = mask & (channels < CHANNELS)[None, :]
        codes = tl.load(codes_ptr + places[:, None] + channels[None, :], mask=mask, other=outside)
        weights = weight_tile(weight_ptr, zero_points, outputs, tap, block, BITS, CHANNELS, ROW_BYTES, ALIGNED, BLOCK_K)
        total = tl.dot(codes, tl.trans(weights), total)

    values = scaled(
        total, pixels, outputs, input_scale_ptr, input_zero_point_ptr, weight_scale_ptr, code_sums_ptr, ACTIVATION_BITS
    )
    if RANK > 0:  # a loop of no steps would be compiled all the same
        for step in range(0, TAPS * RANK_BLOCKS):
            tap = step // RANK_BLOCKS
            down = tap // KERNEL_W
            right = tap % KERNEL_W
            ranks = (step % RANK_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
            exists = (ranks < RANK)[None, :]
            places = (corners + (down * width + right)) * RANK
            mask = _inside(tops, lefts, down, right, height, width)[:, None] & exists
            hidden = tl.load(hidden_ptr + places[:, None] + ranks[None, :], mask=mask, other=0.0)
            up_places = outputs[:, None] * (RANK * TAPS) + (ranks * up_rank_stride + tap * up_tap_stride)[None, :]
            up = tl.load(up_ptr + up_places, mask=exists, other=0.0)
            values = dot_float(hidden, tl.trans(convert(up.to(tl.float32), hidden.dtype)), values)
    write_output(values, rows, columns, outputs, bias_ptr, residual_ptr, out_ptr, rows_count, OUTPUTS)


def conv_product(operand: QuantizedInput, layer: StoredLayer, residual: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The layer's output from its quantized input: (B, H, W, C) -> (B, H', W', N) in ``dtype``, contiguous.

    Args:
        residual: ``dtype`` (B, H', W', N), contiguous, added to the output; None for nothing.

    Raises:
        ValueError: if the image with its padding is smaller than the kernel, or has 2^31 pixels or more.
    """
    spec, (batch, height, width, _) = layer.spec, operand.codes.shape
    _, outputs, out_height, out_width = spec.output_shape((batch, spec.in_channels, height, width))
    if min(out_height, out_width) < 1:
        raise ValueError(f"an image of {height} x {width} is too small for a kernel {spec.kernel_size}; pad it")
    rows = batch * out_height * out_width
    if rows >= 2**31:
        raise ValueError(f"{batch} images of {out_height} x {out_width} are too many pixels at once; make the batch smaller")
    out = torch.empty(batch, out_height, out_width, outputs, dtype=dtype, device=operand.codes.device)
    if out.numel() == 0:
        return out
    up = product_constants(layer).branch_up
    # (N, r, taps): a view, for a pixel-fastest and for a rank-fastest memory format
    up_strides = (0, 0) if up is None else up.flatten(2).stride()[1:]
    tensors, constants = product_arguments(operand, layer, residual, out)
    with torch.cuda.device_of(out):
        _conv_kernel[product_grid(rows, outputs)](
            *tensors,
            rows,
            height,
            width,
            out_height,
            out_width,
            *up_strides,
            size_class(rows),
            KERNEL_H=spec.kernel_size[0],
            KERNEL_W=spec.kernel_size[1],
            STRIDE_H=spec.stride[0],
            STRIDE_W=spec.stride[1],
            PADDING_H=spec.padding[0],
            PADDING_W=spec.padding[1],
            **constants,
        )
    return out


def conv2d(
    x: torch.Tensor, layer: StoredLayer, residual: torch.Tensor | None = None, norm: ChannelNorm | None = None
) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, H', W'), in x's dtype and channels-last memory.

    Args:
        residual: of the output's shape and dtype, added to it.
        norm: applied to x before it is quantized.
    """
    spec, pixels = layer.spec, computable(x).permute(0, 2, 3, 1)
    operand = quantize(pixels, layer, norm)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1).contiguous()
    if spec.is_pointwise:
        rows = None if residual is None else residual.flatten(0, 2)
        y = linear_product(operand, layer, rows, pixels.dtype).view(*pixels.shape[:3], spec.out_channels)
    else:
        y = conv_product(operand, layer, residual, pixels.dtype)
    return y.permute(0, 3, 1, 2).to(x.dtype)
