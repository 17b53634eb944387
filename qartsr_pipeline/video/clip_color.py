"""Gives the frames of a clip the colours of the input: one correction for the whole clip, not one for each frame.

A correction made for each frame by itself would change from frame to frame, which is seen as flicker. Here it is the mean over
all frames so far of what aligns a frame's mean and contrast with those of its enlarged input (AdaIN). So it settles, whatever the
frames show. It begins anew at a cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

COLOR_FIXES = ("adain",)
REDUCTION = 8  # statistics are of frames reduced by this factor, so that added detail does not count as contrast
SMALLEST = 1e-2  # standard deviation below which contrast is left alone: a plain frame has none


class ClipColor:
    """The running correction. Frames must come in order."""

    def __init__(self) -> None:
        self._frames = 0
        self._log_gain = torch.zeros(1, 3, 1, 1)
        self._means = torch.zeros(2, 1, 3, 1, 1)  # of the results and of the references

    def __call__(self, frame: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """The frame, corrected; both (1, 3, H, W) float32, ``reference`` the enlarged input."""
        mean, deviation = _moments(frame)
        wanted_mean, wanted_deviation = _moments(reference)
        plain = (deviation < SMALLEST) | (wanted_deviation < SMALLEST)
        log_gain = torch.where(plain, torch.zeros_like(mean), (wanted_deviation / deviation.clamp_min(1e-6)).log())
        self._frames += 1
        self._log_gain += (log_gain - self._log_gain) / self._frames
        self._means += (torch.stack([mean, wanted_mean]) - self._means) / self._frames
        gain = self._log_gain.exp()
        return (frame - self._means[0]) * gain + self._means[1]


def _moments(frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every channel, (1, 3, 1, 1) each."""
    height, width = (max(1, side // REDUCTION) for side in frame.shape[-2:])
    small = F.adaptive_avg_pool2d(frame, (height, width))
    return small.mean((-2, -1), keepdim=True), small.std((-2, -1), keepdim=True, unbiased=False)
