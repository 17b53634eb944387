"""Passes of video models that numba compiles, as `compiled` has those of images: over tokens, and over the frames of the
autoencoder's maps.

Codes and scales of tokens are the same bits as without numba, and so are outputs. The RMS norm and SiLU of frames are computed
in float32 and rounded once, to the dtype of what they are computed from.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from qartsr_pipeline.kernels.compiled import Grid, as_numpy, can_run, demand, in_threads, library


@cache
def _loops() -> Any:
    from qartsr_pipeline.kernels import clip_loops  # numba works: `can_run` was asked before

    return clip_loops


def can_run_tokens(x: torch.Tensor, rotation: int) -> bool:
    """Whether the passes over tokens take such rows, rotated in blocks of this size: a multiple of 16, or 0."""
    return rotation % 16 == 0 and can_run(x)


def quantize_tokens(
    x: torch.Tensor, smooth: torch.Tensor, rotation: int, powers: torch.Tensor | None, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The quantize step of the token grid, the same integers and scales as `tokens` has without numba.

    Args:
        x: (rows, C).
        smooth: (C,) float32.
        rotation: see `can_run_tokens`.
        powers: 2^e, (C,) float32; None without exponents.
        most: the largest code.

    Returns:
        Codes, int8 (rows, C); scales, float32 (rows,).

    Raises:
        RuntimeError: the input has other channels than the layer.
    """
    demand(x.shape[-1:], *(smooth,) if powers is None else (smooth, powers))
    codes, scales = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), dtype=torch.float32)
    powers = scales.new_empty(0) if powers is None else powers
    torch.ops.qartsr_cpu.quantize_tokens(x.contiguous(), smooth, rotation, powers, most, codes, scales)
    return codes, scales


def scale_tokens(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = bias + scales y, rounded once to float32, and then to `out`'s dtype.

    Args:
        y: float32 (rows, N), contiguous, as `out` is, which may be the same.
        scales: float32 (rows,).
        bias: float32 (N,).

    Raises:
        RuntimeError: shapes do not fit.
    """
    demand(y.shape, out)
    demand(y.shape[:1], scales)
    if bias is not None:
        demand(y.shape[1:], bias)
    torch.ops.qartsr_cpu.scale_tokens(y, scales, y.new_empty(0) if bias is None else bias, out)


def quantize_frames(
    x: torch.Tensor, before: torch.Tensor | None, weight: torch.Tensor, grid: Grid, taps: int, kept: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of ``silu(rms_norm(x))``, those of `taps` frames side by side: what a causal convolution over time multiplies.

    Args:
        x: (frames, pixels, C), contiguous.
        before: (up to taps - 1, pixels, C), normalized frames before x, in x's dtype; None at the start of a clip. Frames before
            these are zeros.
        weight: the norm's, times sqrt(C), (C,) float32.
        grid: for taps C channels.
        kept: how many of the last frames are wanted, normalized.

    Returns:
        (frames, pixels, taps C), of the grid's dtype; (kept, pixels, C) in x's dtype; and a number that is not finite where x is
        not.

    Raises:
        RuntimeError: shapes do not fit.
    """
    frames, pixels, channels = x.shape
    demand((channels,), weight)
    demand((taps * channels,), grid.multiplier)
    before = x.new_empty(0, pixels, channels) if before is None else before.contiguous()
    demand((pixels, channels), before[:1].mean(0) if len(before) else x[0])
    codes = torch.empty(frames, pixels, taps * channels, dtype=grid.dtype)
    last, total = x.new_empty(kept, pixels, channels), torch.zeros(1)
    limits = (grid.low, grid.high, grid.offset)
    torch.ops.qartsr_cpu.quantize_frames(x, before, weight, grid.multiplier, *limits, codes, last, total)
    return codes, last, total


def _quantize_tokens(
    x: torch.Tensor,
    smooth: torch.Tensor,
    rotation: int,
    powers: torch.Tensor,
    most: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    source, target, scale = as_numpy(x, *x.shape), as_numpy(codes.view(torch.uint8), *x.shape), as_numpy(scales, -1)
    constants = (as_numpy(smooth, -1), rotation, as_numpy(1 / powers, -1), as_numpy(powers, -1), most)

    def part(rows: slice) -> None:
        _loops().quantize(source[rows], *constants, target[rows], scale[rows])

    in_threads(part, source)


def _scale_tokens(y: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor, out: torch.Tensor) -> None:
    source, target, scale, summand = as_numpy(y, *y.shape), as_numpy(out, *y.shape), as_numpy(scales, -1), as_numpy(bias, -1)

    def part(rows: slice) -> None:
        _loops().scale(source[rows], scale[rows], summand, target[rows])

    in_threads(part, source)


def _quantize_frames(
    x: torch.Tensor,
    before: torch.Tensor,
    weight: torch.Tensor,
    multiplier: torch.Tensor,
    low: int,
    high: int,
    offset: int,
    codes: torch.Tensor,
    last: torch.Tensor,
    total: torch.Tensor,
) -> None:
    source, earlier, target, kept = (as_numpy(t, *t.shape) for t in (x, before, codes, last))
    constants = (as_numpy(weight, -1), as_numpy(multiplier, -1), low, high, offset)

    def part(rows: slice) -> float:
        return _loops().quantize_frames(source[:, rows], earlier[:, rows], *constants, target[:, rows], kept[:, rows])

    total += sum(in_threads(part, source.transpose(1, 0, 2)))


for _name, _arguments, _function in (
    (
        "quantize_tokens",
        "Tensor x, Tensor smooth, int rotation, Tensor powers, int most, Tensor(a!) codes, Tensor(b!) scales",
        _quantize_tokens,
    ),
    ("scale_tokens", "Tensor y, Tensor scales, Tensor bias, Tensor(a!) out", _scale_tokens),
    (
        "quantize_frames",
        "Tensor x, Tensor before, Tensor weight, Tensor multiplier, int low, int high, int offset, Tensor(a!) codes,"
        " Tensor(b!) last, Tensor(c!) total",
        _quantize_frames,
    ),
):
    library.define(f"{_name}({_arguments}) -> ()")
    library.impl(_name, _function, "CPU")
