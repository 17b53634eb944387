"""The integers that backends multiply: weights as centred codes, and the quantize step that makes codes of a layer's input.

The quantize step gives the same integers as `arithmetic.affine.centred_codes`. On a CPU with numba it is one loop (`compiled`).
Otherwise it takes few passes: an input as large as a feature map is worked through in blocks that stay in the processor's cache:
multiply, round, clamp and convert each touch the block only. On other devices blocks are larger, and only bound the memory.
`torch.quantize_per_channel` does the same in one pass without vector instructions, ten times slower (and `quantize_per_tensor`
plus `int_repr` is no faster than this, warns that it will be removed, and turns NaN and large values into whatever the processor
makes of them).

NaN becomes the zero point, the code of 0, as in the reference: a float NaN converts to the integer 0 on all supported hardware.
"""

from __future__ import annotations

import torch

from qartsr_pipeline.arithmetic.packing import unpack
from qartsr_pipeline.kernels import compiled
from qartsr_pipeline.kernels.compiled import Grid
from qartsr_pipeline.kernels.stored_layer import StoredLayer

BLOCK_ELEMENTS = 1 << 18  # for each thread; 1 MiB in float32, near the second-level cache of one core; more calls if smaller
DEVICE_BLOCK_ELEMENTS = 1 << 24


def weight_bytes(layer: StoredLayer) -> torch.Tensor:
    """Centred weight codes as int8: (N, C) of a linear layer, (N, C, kh, kw) of a convolution, channels-last."""
    spec = layer.spec
    codes = unpack(layer.weight_packed, spec.weight_bits, spec.taps * spec.in_channels).contiguous().view(torch.int8)
    if spec.weight_bits < 8:
        codes = codes - layer.weight_zero_point.view(torch.int8)[:, None]  # both below 64
    if spec.kind == "linear":
        return codes
    return codes.view(-1, *spec.kernel_size, spec.in_channels).permute(0, 3, 1, 2)  # stored (N, kh, kw, C)


def block_rows(columns: int, device: str = "cpu") -> int:
    """How many rows are worked through at once: about BLOCK_ELEMENTS elements for each of torch's threads, which share a block,
    or DEVICE_BLOCK_ELEMENTS on another type of device than the CPU.
    """
    elements = BLOCK_ELEMENTS * torch.get_num_threads() if device == "cpu" else DEVICE_BLOCK_ELEMENTS
    return max(1, elements // max(1, columns))


def quantize(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Codes of a matrix (rows, C) of any float dtype, on any device: (rows, C) of the grid's dtype."""
    if compiled.can_run(x):
        return compiled.quantize(x, grid)
    return _floats(x, grid) if grid.dtype.is_floating_point else _bytes(x, grid)


def _bytes(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    rows, count = block_rows(x.shape[1], x.device.type), x.shape[0]
    scratch = torch.empty((min(rows, count), x.shape[1]), dtype=torch.float32, device=x.device)
    for source, target in ((x, codes),) if count <= rows else zip(x.split(rows), codes.split(rows), strict=True):
        block = scratch if source.shape[0] == scratch.shape[0] else scratch[: source.shape[0]]
        torch.mul(source, grid.multiplier, out=block).round_().clamp_(grid.low, grid.high)
        # a float outside the range of the integer it is converted to has no defined result, so 9-bit codes take a detour
        target.copy_(block if grid.high - grid.low < 255 else block.to(torch.int16))
    unsigned = codes.view(torch.uint8)
    return unsigned.add_(grid.offset % 256) if grid.offset else unsigned


def _floats(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    codes = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    rows = block_rows(x.shape[1])
    for source, target in zip(x.split(rows), codes.split(rows), strict=True):
        torch.mul(source, grid.multiplier, out=target).round_().clamp_(grid.low, grid.high).nan_to_num_(nan=0.0)
    return codes
