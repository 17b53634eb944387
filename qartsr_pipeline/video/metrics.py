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
        temporal_error: mean absolute difference between the change of luma from one frame to the next and the target's, in
            255ths; None for a single frame. Flicker raises it, and so does motion that is not followed.
    """

    frames: int
    psnr_y: float
    ssim_y: float
    temporal_error: float | None


def clip_scores(frames: Iterable[np.ndarray], targets: Iterable[np.ndarray], border: int = 4) -> ClipScores:
    """Scores of a clip against its original; both are read frame by frame, so that neither stands in memory.

    Args:
        frames, targets: float arrays (H, W, 3) in [0, 1], as `LSGQuantVideoPipeline.stream` yields them.
        border: pixels left out on every side.

    Raises:
        ValueError: there is no frame, one clip is longer, or frames differ in size.
    """
    psnr, ssim, changes = [], [], []
    before: torch.Tensor | None = None
    for frame, target in zip(frames, targets, strict=True):
        psnr.append(psnr_y(frame, target, border))
        ssim.append(ssim_y(frame, target, border))
        error = luma(frame) - luma(target)  # the difference of changes is the change of the difference
        error = error[border : error.shape[0] - border, border : error.shape[1] - border]
        if before is not None:
            changes.append(float((error - before).abs().mean()) * 255)
        before = error
    if not psnr:
        raise ValueError("There are no frames to measure.")
    temporal = float(np.mean(changes)) if changes else None
    return ClipScores(len(psnr), float(np.mean(psnr)), float(np.mean(ssim)), temporal)
