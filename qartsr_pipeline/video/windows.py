"""A stream of latents cut into overlapping windows in time, each refined by itself, and blended into a stream again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from qartsr_pipeline.image.tiles import ramp


def refined_in_windows(
    latents: Iterator[torch.Tensor], refine: Callable[[torch.Tensor], torch.Tensor], length: int, overlap: int
) -> Iterator[torch.Tensor]:
    """The refined stream: as many latents as come in, in order; at most one window of them is held.

    Windows begin every ``length - overlap`` latents. Where two meet, one fades into the next along a raised cosine over the
    middle half of the overlap. The last window ends with the clip, so it overlaps further, which is context only. A clip no
    longer than ``length`` is one window.

    Args:
        latents: float tensors (1, C, f, h, w) of any f each.
        refine: (1, C, f, h, w), f <= length -> the same shape.
        length: of a window, at least 1.
        overlap: at most half of it.
    """
    held: torch.Tensor | None = None  # the last latents, up to the end of what came in
    tail: torch.Tensor | None = None  # the last refined window's part that the next one overlaps
    refined_up_to = 0  # how many of the held latents have been in a window
    for part in latents:
        held = part if held is None else torch.cat([held, part], dim=2)
        while held.shape[2] >= (length if tail is None else refined_up_to - overlap + length):
            start = 0 if tail is None else refined_up_to - overlap
            result = _faded(tail, refine(held[:, :, start : start + length]), overlap)
            yield result[:, :, : length - overlap]
            tail, refined_up_to = result[:, :, length - overlap :], length
            held = held[:, :, start:]
    if held is None:
        return
    if tail is None:
        yield refine(held)
    elif held.shape[2] > refined_up_to:  # what is left, with as much context before it as a window has
        begin = refined_up_to - overlap
        start = max(0, held.shape[2] - length)
        yield _faded(tail, refine(held[:, :, start:])[:, :, begin - start :], overlap)
    elif overlap:
        yield tail


def _faded(tail: torch.Tensor | None, result: torch.Tensor, overlap: int) -> torch.Tensor:
    """``result``, whose first ``overlap`` latents are blended with ``tail``."""
    if tail is None or not overlap:
        return result
    rise = ramp(overlap).to(result).view(1, 1, -1, 1, 1)
    return torch.cat([torch.lerp(tail, result[:, :, :overlap], rise), result[:, :, overlap:]], dim=2)
