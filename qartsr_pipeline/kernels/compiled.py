"""Passes over feature maps that numba compiles for this processor, on CPUs where the package numba is installed (`qartsr[fast]`).

Made of torch's operators, the quantize step alone passes over its input five times. Here it is one loop, and GroupNorm, SiLU and
quantize step together are two: one for the statistics, one for the rest. Codes of the quantize step are the same integers as
without numba. Norm and SiLU are computed in float32 and not rounded in between, as in Triton's kernels.

Loops run over rows of channels-last memory. Several pixels make one row, which vector instructions work through; large maps are
divided among as many threads as torch has.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from numpy import ndarray as Array
from torch import nn

logger = logging.getLogger(__name__)
ROW_LENGTH = 512  # at least so many values, if there are enough pixels
FEWEST_FOR_THREADS = 1 << 17  # values
BLOCK = 64  # rows that are summed in float32
BITS_OF = {torch.bfloat16: torch.uint16, torch.float32: torch.float32}  # what numpy sees of a dtype
Part = TypeVar("Part")


@cache
def _loaded() -> tuple[Any, str | None]:
    """The module of what numba compiles, imported at the first use; or None, and why it is of no use here."""
    if find_spec("numba") is None:
        return None, "numba is not installed: pip install 'qartsr[fast]'"
    try:
        from numba import config

        from qartsr_pipeline.kernels import loops
    except Exception as error:  # such as a numpy that this numba does not know, or no folder to keep compiled code in
        return None, _refused(str(error))
    return (None, _refused("NUMBA_DISABLE_JIT is set")) if config.DISABLE_JIT else (loops, None)


def _refused(reason: str) -> str:
    logger.warning("numba is installed but cannot be used, so quantized layers take longer: %s", reason)
    return f"numba cannot be used: {reason}"


def _loops() -> Any:
    return _loaded()[0]


def unavailable() -> str | None:
    """Why compiled loops do not run here; None if they do."""
    return _loaded()[1]


def works() -> bool:
    """Whether there is a numba that works."""
    return _loops() is not None


def can_run(x: torch.Tensor) -> bool:
    """Whether the passes take such a tensor."""
    return x.device.type == "cpu" and x.dtype in BITS_OF and works()


@dataclass(frozen=True)
class Grid:
    """What a quantize step makes of x: clamp(rint(multiplier x), low, high) + offset.

    Attributes:
        multiplier: phi / scale, (C,) float32.
        low, high: smallest and largest centred code.
        offset: what centred codes are stored with: the zero point gives unsigned ones. 0 for floats.
        dtype: that codes are stored in: uint8, modulo 256 (with offset 0 its view as int8 is the code, if that fits: up to 6
            bits), or float32.
    """

    multiplier: torch.Tensor
    low: int
    high: int
    offset: int
    dtype: torch.dtype


def quantize(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(rows, C) -> codes of the same shape. NaN becomes the code of 0.

    Raises:
        RuntimeError: where the grid has another number of channels. Compiled loops would not notice.
    """
    demand(x.shape[-1:], grid.multiplier)
    codes = torch.empty(x.shape, dtype=grid.dtype)
    torch.ops.qartsr_cpu.quantize(x.contiguous(), grid.multiplier, grid.low, grid.high, grid.offset, codes)
    return codes


def normalize_and_quantize(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, grid: Grid, keep: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes of ``silu(scale x + shift)``.

    Args:
        x: (B, pixels, C), contiguous.
        scale, shift: (B, C) float32.
        keep: whether what is quantized is wanted, too.

    Returns:
        (B pixels, C), and the values that were quantized, in x's dtype.

    Raises:
        RuntimeError: see `quantize`.
    """
    demand(x.shape[-1:], grid.multiplier)
    demand((x.shape[0], x.shape[2]), scale, shift)
    rows = (x.shape[0] * x.shape[1], x.shape[2])
    codes = torch.empty(rows, dtype=grid.dtype)
    kept = torch.empty(rows if keep else (0, 0), dtype=x.dtype)
    torch.ops.qartsr_cpu.normalize_and_quantize(x, scale, shift, grid.multiplier, grid.low, grid.high, grid.offset, codes, kept)
    return codes, kept if keep else None


def group_scale_shift(x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x (B, pixels, C), contiguous, as one factor and one summand a channel: float32 (B, C), twice.

    Raises:
        RuntimeError: see `quantize`.
    """
    scale, shift = torch.empty(2, x.shape[0], x.shape[2])
    demand(x.shape[-1:], norm.weight, norm.bias)
    weight, bias = norm.weight.detach().float(), norm.bias.detach().float()
    torch.ops.qartsr_cpu.group_statistics(x, weight, bias, norm.num_groups, norm.eps, scale, shift)
    return scale, shift


def demand(shape: Sequence[int], *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if tensor.shape != torch.Size(shape):
            raise RuntimeError(f"the input has other channels than the layer: {tuple(tensor.shape)} values for {tuple(shape)}")


def _row_length(pixels: int, channels: int) -> int:
    length = channels
    while length < ROW_LENGTH and pixels % 2 == 0 and pixels:
        length, pixels = 2 * length, pixels // 2
    return length


def as_numpy(x: torch.Tensor, *shape: int) -> Array:
    return x.detach().view(BITS_OF.get(x.dtype, x.dtype)).view(shape).numpy()


@cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "qartsr")


if sys.platform != "win32":
    os.register_at_fork(after_in_child=pool.cache_clear)  # threads stay behind: a child would wait for them


def in_threads(part: Callable[[slice], Part], rows: Array) -> list[Part]:
    """What `part` returns for some of the rows, for all of them."""
    threads = torch.get_num_threads()
    if threads == 1 or rows.size < FEWEST_FOR_THREADS:
        return [part(slice(None))]
    step = -(-len(rows) // (threads * BLOCK)) * BLOCK  # so that sums are of the same rows with any number of threads
    return list(pool(threads).map(part, (slice(start, start + step) for start in range(0, len(rows), step))))


def _quantize(x: torch.Tensor, multiplier: torch.Tensor, low: int, high: int, offset: int, codes: torch.Tensor) -> None:
    length = _row_length(*x.shape)
    source, target, factors = as_numpy(x, -1, length), as_numpy(codes, -1, length), as_numpy(multiplier, -1)

    def part(rows: slice) -> None:
        _loops().quantize(source[rows], factors, low, high, offset, target[rows])

    in_threads(part, source)


def _normalize_and_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    multiplier: torch.Tensor,
    low: int,
    high: int,
    offset: int,
    codes: torch.Tensor,
    kept: torch.Tensor,
) -> None:
    batch, pixels, channels = x.shape
    length = _row_length(pixels, channels)
    sources, targets = as_numpy(x, batch, -1, length), as_numpy(codes, batch, -1, length)
    keeps = as_numpy(kept, batch, -1, length) if kept.numel() else as_numpy(kept, 1, 0, 0).repeat(batch, 0)
    scales, shifts, factors = as_numpy(scale, batch, -1), as_numpy(shift, batch, -1), as_numpy(multiplier, -1)

    for image in range(batch):

        def part(rows: slice, image: int = image) -> None:
            affine, written = (scales[image], shifts[image]), (targets[image, rows], keeps[image, rows])
            _loops().normalize_and_quantize(sources[image, rows], *affine, factors, low, high, offset, *written)

        in_threads(part, sources[image])


def _group_statistics(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, scale: torch.Tensor, shift: torch.Tensor
) -> None:
    batch, pixels, channels = x.shape
    affine = (as_numpy(weight, -1), as_numpy(bias, -1), groups, eps)
    for number, image in enumerate(as_numpy(x, batch, -1, _row_length(pixels, channels))):

        def part(rows: slice, image: Array = image) -> Array:
            return _loops().sums(image[rows], image[0], BLOCK)

        total = sum(in_threads(part, image))
        _loops().scale_shift(total, image[0], len(image), *affine, as_numpy(scale[number], -1), as_numpy(shift[number], -1))


# Operators of torch's, so that its profilers and `cli.timing` see them.
library = torch.library.Library("qartsr_cpu", "DEF")
_GRID = "Tensor multiplier, int low, int high, int offset, Tensor(a!) codes"
for _name, _arguments, _function in (
    ("quantize", f"Tensor x, {_GRID}", _quantize),
    ("normalize_and_quantize", f"Tensor x, Tensor scale, Tensor shift, {_GRID}, Tensor(b!) kept", _normalize_and_quantize),
    (
        "group_statistics",
        "Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor(a!) scale, Tensor(b!) shift",
        _group_statistics,
    ),
):
    library.define(f"{_name}({_arguments}) -> ()")
    library.impl(_name, _function, "CPU")
