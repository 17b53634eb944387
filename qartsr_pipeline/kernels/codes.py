"""The integers that backends multiply: weights as centred codes, and the quantize step that makes codes of a layer's input.

The quantize step gives the same integers as `arithmetic.affine.centred_codes`, in few passes. An input as large as a feature map
is worked through in blocks that stay in the processor's cache: multiply, round, clamp and convert each touch the block only. On
other devices blocks are larger, and only bound the memory. `torch.quantize_per_channel` does the same in one pass without vector
instructions, ten times slower (and `quantize_per_tensor` plus `int_repr` is no faster than this, warns that it will be removed,
and turns NaN and large values into whatever the processor makes of them).

NaN becomes the zero point, the code of 0, as in the reference: a float NaN converts to the integer 0 on all supported hardware.
"""

from __future__ import annotations

import torch

from qartsr_pipeline.arithmetic.packing import unpack
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


def quantized_rows(x: torch.Tensor, multiplier: torch.Tensor, zero_point: int, bits: int, offset: int) -> torch.Tensor:
    """Codes of a matrix, plus an offset.

    Args:
        x: (rows, C), any float dtype.
        multiplier: phi / scale, (C,) float32.
        offset: what the centred code c is stored with: `zero_point` gives the unsigned code q = c + zero_point.

    Returns:
        uint8, (rows, C): (c + offset) modulo 256. With offset 0 its view as int8 is c, if that fits (up to 6 bits).
    """
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    low, high = -zero_point, 2**bits - 1 - zero_point
    rows, count = block_rows(x.shape[1], x.device.type), x.shape[0]
    scratch = torch.empty((min(rows, count), x.shape[1]), dtype=torch.float32, device=x.device)
    for source, target in ((x, codes),) if count <= rows else zip(x.split(rows), codes.split(rows), strict=True):
        block = scratch if source.shape[0] == scratch.shape[0] else scratch[: source.shape[0]]
        torch.mul(source, multiplier, out=block).round_().clamp_(low, high)
        # a float outside the range of the integer it is converted to has no defined result, so 9-bit codes take a detour
        target.copy_(block if bits < 8 else block.to(torch.int16))
    unsigned = codes.view(torch.uint8)
    return unsigned.add_(offset % 256) if offset else unsigned


def quantized_floats(x: torch.Tensor, multiplier: torch.Tensor, zero_point: int, bits: int) -> torch.Tensor:
    """Centred codes of a matrix (rows, C), float32; arguments as for `quantized_rows`."""
    codes = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    low, high = -zero_point, 2**bits - 1 - zero_point
    rows = block_rows(x.shape[1])
    for source, target in zip(x.split(rows), codes.split(rows), strict=True):
        torch.mul(source, multiplier, out=target).round_().clamp_(low, high).nan_to_num_(nan=0.0)
    return codes
