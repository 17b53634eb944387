"""How close two clips are: PSNR-Y and SSIM over their frames, and the error of what changes from frame to frame.

Frames are measured as `image.metrics` measures images: BT.601 luma, a border as wide as the scale left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from qartsr_pipeline.image.metrics import luma, psnr_y, ssim_y


@dataclass(frozen=True)
class ClipScores:
    """The scores of one clip, means over its frames.

    Attributes:
        frames: how many there are.
        psnr_y: dB. ssim_y: up to 1.
        temporal_error: see `TemporalError`; None for a single frame. Flicker raises it, and so does motion that is not followed.
    """

    frames: int
    psnr_y: float
    ssim_y: float
    temporal_error: float | None


class TemporalError:
    """The mean absolute difference between the change of luma from one frame to the next and the original's, in 255ths.

    Args:
        border: pixels left out on every side.
    """

    def __init__(self, border: int = 4) -> None:
        self.border = border
        self._before: torch.Tensor | None = None
        self._changes: list[float] = []

    def add(self, frame: np.ndarray | torch.Tensor, target: np.ndarray | torch.Tensor) -> None:
        """The next frame and that of the original, as `image.metrics.luma` takes them."""
        error = luma(frame) - luma(target)  # the difference of changes is the change of the difference
        error = error[self.border : error.shape[0] - self.border, self.border : error.shape[1] - self.border]
        if self._before is not None:
            self._changes.append(float((error - self._before).abs().mean()) * 255)
        self._before = error

    @property
    def mean(self) -> float | None:
        """None before the second frame."""
        return float(np.mean(self._changes)) if self._changes else None


def clip_scores(frames: Iterable[np.ndarray], targets: Iterable[np.ndarray], border: int = 4) -> ClipScores:
    """Scores of a clip against its original; both are read frame by frame, so that neither stands in memory.

    Args:
        frames, targets: float arrays (H, W, 3) in [0, 1], as `LSGQuantVideoPipeline.stream` yields them.
        border: pixels left out on every side.

    Raises:
        ValueError: there is no frame, one clip is longer, or frames differ in size.
    """
    psnr, ssim, temporal = [], [], TemporalError(border)
    for frame, target in zip(frames, targets, strict=True):
        psnr.append(psnr_y(frame, target, border))
        ssim.append(ssim_y(frame, target, border))
        temporal.add(frame, target)
    if not psnr:
        raise ValueError("There are no frames to measure.")
    return ClipScores(len(psnr), float(np.mean(psnr)), float(np.mean(ssim)), temporal.mean)
