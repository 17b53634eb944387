"""How close two clips are: PSNR-Y and SSIM over their frames, and the error of what changes from frame to frame.

Frames are measured as `image.metrics` measures images: BT.601 luma, a border as wide as the scale left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

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


def optical_flow(frame: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Where the pixels of a frame were in the frame before, by TV-L1, as `warping_error` takes it.

    A pixel is occluded, NaN, where the flow there and back does not lead home: |w + w'|^2 > 0.01 (|w|^2 + |w'|^2) + 0.5, the rule
    of Sundaram et al. (ECCV 2010) that Lai et al. (arXiv 1808.00449) use. The flow is scikit-image's, of Zach et al. (2007).

    Args:
        frame, before: float arrays (H, W, 3) in [0, 1] of one size, at least 16 pixels a side.

    Returns:
        (H, W, 2) float32.

    Raises:
        ValueError: the sizes differ. ImportError: scikit-image is not installed.
    """
    check_optical_flow()
    from skimage.registration import optical_flow_tvl1

    if frame.shape != before.shape:
        raise ValueError(f"A frame of shape {frame.shape} follows one of {before.shape}.")
    now, then = (luma(image).float().numpy() for image in (frame, before))
    back, forth = optical_flow_tvl1(now, then), optical_flow_tvl1(then, now)  # (2, H, W) each
    place = torch.from_numpy(np.indices(now.shape) + back)[None]
    limits = torch.tensor([now.shape[0] - 1, now.shape[1] - 1]).clamp(min=1).view(1, 2, 1, 1)
    grid = (2 * place / limits - 1).flip(1).movedim(1, -1).float()
    home = F.grid_sample(torch.from_numpy(forth)[None], grid, padding_mode="border", align_corners=True)[0].numpy()
    size = (back**2).sum(0) + (home**2).sum(0)
    back[:, ((back + home) ** 2).sum(0) > 0.01 * size + 0.5] = np.nan
    return back.transpose(1, 2, 0)


def check_optical_flow() -> None:
    """Raises ImportError, which says how to install it, if `optical_flow` lacks its package."""
    try:
        import skimage.registration  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"optical flow is computed by scikit-image, which cannot be imported ({error}): install it with"
            " `pip install 'qartsr[metrics]'`, or leave out e_warp"
        ) from error


def warping_error(frames: Iterable[np.ndarray], flows: Iterable[np.ndarray], border: int = 4) -> float:
    """E_warp: what of a frame cannot be predicted by moving the frame before it, where the motion is known or estimated.

    The mean squared difference between a frame and its predecessor warped by the flow, times 1000, as Lai et al. (arXiv
    1808.00449) and LSGQuant report it. Pixels that come from outside the frame are left out; occlusions are the flow's to mark,
    with NaN.

    Args:
        frames: F arrays (H, W, 3), float in [0, 1].
        flows: F - 1 arrays (H, W, 2), float: pixel (y, x) of a frame was at (y + flow[y, x, 0], x + flow[y, x, 1]) in the frame
            before.
        border: pixels left out on every side.

    Raises:
        ValueError: less than two frames, another number of flows, another size, or no pixel whose origin is known.
    """
    errors = []
    iterator = iter(frames)
    before = next(iterator, None)
    for frame, flow in zip(iterator, flows, strict=True):
        assert before is not None  # or there would be no frame
        if frame.shape != before.shape or flow.shape != (*frame.shape[:2], 2):
            raise ValueError(f"A frame of shape {frame.shape} follows one of {before.shape}, with a flow of {flow.shape}.")
        height, width = frame.shape[:2]
        place = np.indices((height, width)).transpose(1, 2, 0) + flow
        with np.errstate(invalid="ignore"):
            known = ((place >= 0) & (place <= [height - 1, width - 1])).all(-1)
        known &= np.pad(np.ones((height - 2 * border, width - 2 * border), bool), border)
        if not known.any():
            raise ValueError("The flow leads out of the frame everywhere, so nothing can be compared.")
        grid = torch.from_numpy(np.nan_to_num(place)[None, ..., ::-1] * [2 / max(1, width - 1), 2 / max(1, height - 1)] - 1)
        source = torch.from_numpy(before).permute(2, 0, 1)[None].double()
        warped = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=True)[0].permute(1, 2, 0)
        errors.append(float(np.square(warped.numpy() - frame)[known].mean()) * 1000)
        before = frame
    if not errors:
        raise ValueError("There are fewer than two frames, so nothing moves.")
    return float(np.mean(errors))
