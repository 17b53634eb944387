"""The product of a linear layer, int8 codes by packed weights, with its epilogue, in one kernel: (rows, C) -> (rows, N). And what
`conv` shares with it: the arguments, and the epilogue that turns the integer product into the layer's output, with scale,
zero-point correction, bias and residual.

8-bit activations are multiplied as code - 128, which fits a signed byte where code - zero point may not. The difference, (128 -
zero point) times the sum of an output's weight codes, is added to the sum in integers: exact. All activations of fewer bits are
multiplied as centred codes and need no correction.

A program computes BLOCK_M x BLOCK_N outputs. Programs that share rows come one after another, so that these rows come from the
cache; all weights fit it anyway.

Assumed of the GPU: sm_80 or later (`tl.dot` of signed bytes, bfloat16); rows start at multiples of 16 bytes wherever C is a
multiple of 16. Programs share nothing, so there is nothing to race for. Registers: the int32 sums become the float32 ones, both
are never alive at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qartsr_pipeline.arithmetic.packing import unpack
from qartsr_pipeline.kernels.stored_layer import StoredLayer
from qartsr_pipeline.kernels.triton import interpreted
from qartsr_pipeline.kernels.triton.device_functions import convert, dot_float, readable, weight_tile
from qartsr_pipeline.kernels.triton.quantize import QuantizedInput, computable, quantize, size_class


def _config(rows: int, outputs: int, inputs: int, warps: int, stages: int) -> triton.Config:
    return triton.Config({"BLOCK_M": rows, "BLOCK_N": outputs, "BLOCK_K": inputs}, num_warps=warps, num_stages=stages)


# A signed-byte product needs 32 inputs at least. 32 inputs serve the layers whose channels are no multiple of 64.
PRODUCT_CONFIGS = [
    _config(128, 128, 64, 8, 3),
    _config(128, 128, 128, 8, 3),
    _config(256, 64, 64, 8, 3),
    _config(128, 64, 64, 4, 4),
    _config(64, 128, 64, 4, 4),
    _config(64, 64, 128, 4, 4),
    _config(64, 64, 64, 4, 4),
    _config(128, 64, 32, 4, 4),
    _config(64, 64, 32, 4, 4),
]
if interpreted():  # see `quantize.QUANTIZE_CONFIGS`
    PRODUCT_CONFIGS = [_config(16, 16, 32, 4, 1)]


def _whole_blocks(configs: list[triton.Config], named_args: dict, **arguments: object) -> list[triton.Config]:
    """Of the configurations whose blocks cut the channels without a remainder, those with the largest; aligned layers need it."""
    channels = {**named_args, **arguments}["CHANNELS"]
    whole = [config for config in configs if channels % config.kwargs["BLOCK_K"] == 0]
    larger = [config for config in whole if config.kwargs["BLOCK_K"] > 32]
    return larger or whole or [config for config in configs if config.kwargs["BLOCK_K"] == 32]


def rank_block(rank: int) -> int:
    """Ranks that a 16-bit product takes at a time: a power of two, 16 at least."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def autotune_product(keys: list[str]):
    """Decorator of a product kernel; ``keys`` names the arguments that choices are kept for."""
    return triton.autotune(PRODUCT_CONFIGS, keys, prune_configs_by={"early_config_prune": _whole_blocks})


@dataclass(frozen=True)
class ProductConstants:
    """What is kept of a layer beside what is stored: a few bytes per output.

    Attributes:
        code_sums: sums of an output's centred weight codes, int32 (N,); None unless activations have 8 bits on the tensor grid.
        branch_up: as stored, but with the rank fastest in memory; None without a branch.
    """

    code_sums: torch.Tensor | None
    branch_up: torch.Tensor | None


def product_constants(layer: StoredLayer) -> ProductConstants:
    """Made at the layer's first call, and kept."""
    return layer.prepared.get(layer, "triton", _make)


def _make(layer: StoredLayer) -> ProductConstants:
    up = layer.branch_up if layer.spec.rank else None
    if up is not None and up.dim() == 4:
        up = up.contiguous(memory_format=torch.channels_last)
    return ProductConstants(_code_sums(layer) if layer.spec.activation_bits == 8 and layer.spec.grid == "tensor" else None, up)


def _code_sums(layer: StoredLayer) -> torch.Tensor:
    spec = layer.spec
    length = spec.in_channels * spec.taps
    codes = unpack(layer.weight_packed, spec.weight_bits, length)
    if spec.weight_bits == 8:
        return codes.view(torch.int8).sum(1, dtype=torch.int32)
    return codes.sum(1, dtype=torch.int32) - length * layer.weight_zero_point.to(torch.int32)


def product_arguments(
    operand: QuantizedInput, layer: StoredLayer, residual: torch.Tensor | None, out: torch.Tensor
) -> tuple[tuple[torch.Tensor | None, ...], dict[str, int]]:
    """The tensors that both kernels begin with, and the constants that both are compiled for.

    Args:
        residual: of out's shape and dtype, contiguous, added to the output; None for nothing.
        out: (..., N), contiguous, to be written.
    """
    spec, kept = layer.spec, product_constants(layer)
    weights, aligned = readable(layer.weight_packed, spec.weight_bits, spec.in_channels)
    tensors = (
        operand.codes,
        weights,
        layer.weight_zero_point,
        layer.weight_scale,
        layer.input_scale if operand.scales is None else operand.scales,
        layer.input_zero_point,
        kept.code_sums,
        operand.hidden if spec.rank else None,
        kept.branch_up,
        layer.bias,
        residual,
        out,
    )
    constants = {
        "OUTPUTS": spec.out_channels,
        "CHANNELS": spec.in_channels,
        "RANK": spec.rank,
        "BITS": spec.weight_bits,
        "ACTIVATION_BITS": spec.activation_bits,
        "ROW_BYTES": layer.weight_packed.shape[1],
        "ALIGNED": aligned,
        "BLOCK_R": rank_block(spec.rank),
    }
    return tensors, constants


def product_grid(rows: int, outputs: int) -> Callable[[dict[str, int]], tuple[int]]:
    """One program for each block of rows and outputs."""
    return lambda chosen: (triton.cdiv(rows, chosen["BLOCK_M"]) * triton.cdiv(outputs, chosen["BLOCK_N"]),)


@triton.jit
def outside_code(zero_point_ptr, ACTIVATION_BITS: tl.constexpr):
    """What zero padding is multiplied as: int8 scalar."""
    if ACTIVATION_BITS == 8:
        return (tl.load(zero_point_ptr).to(tl.int32) - 128).to(tl.int8)
    else:
        return tl.full((), 0, tl.int8)


@triton.jit
def scaled(
    total,
    rows,
    outputs,
    input_scale_ptr,
    input_zero_point_ptr,
    weight_scale_ptr,
    code_sums_ptr,
    ACTIVATION_BITS: tl.constexpr,
):
    """The integer product int32 (rows, outputs) as float32 values.

    Args:
        rows: int64, of the input; read on the token grid only, where there is no zero point and every row has its scale.
    """
    if input_zero_point_ptr is None:
        own = tl.load(input_scale_ptr + rows)[:, None] * tl.load(weight_scale_ptr + outputs)[None, :]
        return total.to(tl.float32) * own
    if ACTIVATION_BITS == 8:
        shift = 128 - tl.load(input_zero_point_ptr).to(tl.int32)
        total += (shift * tl.load(code_sums_ptr + outputs))[None, :]
    scale = tl.load(input_scale_ptr) * tl.load(weight_scale_ptr + outputs)
    return total.to(tl.float32) * scale[None, :]


@triton.jit
def write_output(values, rows, columns, outputs, bias_ptr, residual_ptr, out_ptr, ROWS, OUTPUTS: tl.constexpr):
    """Adds bias and residual, converts and writes (rows, columns) of the row-major output.

    Args:
        columns: column numbers, which may lie beyond OUTPUTS; ``outputs`` are the same, wrapped into range.
    """
    if bias_ptr is not None:
        values += tl.load(bias_ptr + outputs)[None, :]
    offsets = rows.to(tl.int64)[:, None] * OUTPUTS + columns[None, :]
    mask = (rows < ROWS)[:, None] & (columns < OUTPUTS)[None, :]
    if residual_ptr is not None:
        values += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, convert(values, out_ptr.dtype.element_ty), mask=mask)


@autotune_product(["size_class", "OUTPUTS", "CHANNELS", "RANK", "BITS", "ACTIVATION_BITS"])
@triton.jit
def _linear_kernel(
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
    size_class,
    OUTPUTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
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
    program = tl.program_id(0)
    rows = (program // COLUMN_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % COLUMN_BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    outputs = columns % OUTPUTS  # what lies beyond the last output is computed twice and not written
    row_offsets = (rows % rows_count).to(tl.int64)
    zero_points = None
    if BITS < 8:
        zero_points = tl.load(zero_points_ptr + outputs).to(tl.int8)

    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.int32)
    for block in range(0, (CHANNELS + BLOCK_K - 1) // BLOCK_K):
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        pointers = codes_ptr + (row_offsets * CHANNELS)[:, None] + channels[None, :]
        if ALIGNED:
            codes = tl.load(pointers)
        else:
            codes = tl.load(pointers, mask=(channels < CHANNELS)[None, :], other=0)
        weights = weight_tile(weight_ptr, zero_points, outputs, 0, block, BITS, CHANNELS, ROW_BYTES, ALIGNED, BLOCK_K)
        total = tl.dot(codes, tl.trans(weights), total)

    values = scaled(
        total, row_offsets, outputs, input_scale_ptr, input_zero_point_ptr, weight_scale_ptr, code_sums_ptr, ACTIVATION_BITS
    )
    for first in tl.static_range(0, RANK, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        inside = (ranks < RANK)[None, :]
        hidden = tl.load(hidden_ptr + (row_offsets * RANK)[:, None] + ranks[None, :], mask=inside, other=0.0)
        up = tl.load(up_ptr + outputs[:, None] * RANK + ranks[None, :], mask=inside, other=0.0)
        values = dot_float(hidden, tl.trans(convert(up.to(tl.float32), hidden.dtype)), values)
    write_output(values, rows, columns, outputs, bias_ptr, residual_ptr, out_ptr, rows_count, OUTPUTS)


def linear_product(
    operand: QuantizedInput, layer: StoredLayer, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The layer's output from its quantized input: (B, H, W, C) -> (B H W, N) in ``dtype``.

    Args:
        residual: ``dtype`` (B H W, N), contiguous, added to the output; None for nothing.
    """
    outputs, rows = layer.spec.out_channels, operand.codes.shape[:3].numel()
    out = torch.empty(rows, outputs, dtype=dtype, device=operand.codes.device)
    if out.numel() == 0:
        return out
    tensors, constants = product_arguments(operand, layer, residual, out)
    with torch.cuda.device_of(out):
        _linear_kernel[product_grid(rows, outputs)](*tensors, rows, size_class(rows), **constants)
    return out


def linear(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """(..., C) -> (..., N), in x's dtype."""
    rows = computable(x).reshape(1, 1, -1, x.shape[-1])
    y = linear_product(quantize(rows, layer), layer, None, rows.dtype)
    return y.view(*x.shape[:-1], layer.spec.out_channels).to(x.dtype)
