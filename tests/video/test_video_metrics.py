"""Scores of clips."""

from __future__ import annotations

import numpy as np
import pytest

from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.video.metrics import clip_scores


def test_scores_are_means_over_frames_and_see_flicker():
    target = np.random.default_rng(0).random((4, 24, 28, 3)).astype(np.float32) * 0.5 + 0.25
    same = clip_scores(iter(target), iter(target))
    assert same.frames == 4 and same.psnr_y == np.inf and same.ssim_y == pytest.approx(1) and same.temporal_error == 0
    shifted, flickering = target + 0.1, target + np.array([0.1, -0.1, 0.1, -0.1], np.float32).reshape(-1, 1, 1, 1)
    steady, unsteady = clip_scores(shifted, target), clip_scores(flickering, target)
    assert steady.psnr_y == pytest.approx(unsteady.psnr_y, abs=1e-3) == pytest.approx(psnr_y(shifted[0], target[0]), abs=1e-3)
    assert steady.temporal_error == pytest.approx(0, abs=1e-4)
    assert unsteady.temporal_error == pytest.approx(0.2 * (65.481 + 128.553 + 24.966), rel=1e-3)
    assert clip_scores(target[:1], target[:1]).temporal_error is None


def test_clips_of_different_length_or_size_are_refused():
    target = np.zeros((3, 24, 24, 3), np.float32)
    for made, wanted in ((target[:2], target), (target[:, :23], target), (target[:0], target[:0])):
        with pytest.raises(ValueError):
            clip_scores(made, wanted)
