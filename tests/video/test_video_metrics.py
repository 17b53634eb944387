"""Scores of clips."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.video.metrics import clip_scores, optical_flow, warping_error


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


def test_warping_error_is_that_of_what_does_not_follow_the_motion():
    image = np.random.default_rng(0).random((40, 50, 3)).astype(np.float32)
    frames = [image[2 * step : 2 * step + 24, 3 * step : 3 * step + 28] for step in range(4)]  # moves up and to the left
    flows = [np.full((24, 28, 2), (2.0, 3.0))] * 3
    assert warping_error(frames, flows) == pytest.approx(0, abs=1e-6)
    flickering = [frame + 0.1 * (-1) ** number for number, frame in enumerate(frames)]
    assert warping_error(flickering, flows) == pytest.approx(0.2**2 * 1000, rel=1e-3)
    assert warping_error(frames, [-flow for flow in flows]) > 50
    half = [flow.copy() for flow in flows]
    for flow in half:
        flow[:, 14:] = np.nan  # occluded
    broken = [np.where(np.arange(28)[:, None] >= 14, 0.5, frame) for frame in frames]
    assert warping_error([*frames[:1], *broken[1:]], half) < 40
    for bad in ((frames[:1], []), (frames, flows[:2]), (frames, [np.full((24, 28, 2), 99.0)] * 3), (frames, [flows[0][:5]] * 3)):
        with pytest.raises(ValueError):
            warping_error(*bad)


def test_optical_flow_finds_motion_and_what_was_hidden():
    noise = np.random.default_rng(0).random((20, 24), np.float32)
    image = np.asarray(Image.fromarray(noise).resize((96, 80), Image.Resampling.BICUBIC))[..., None].repeat(3, 2).clip(0, 1)
    before, frame = image[8:56, 8:72], image[9:57, 10:74]
    flow = optical_flow(frame, before)
    inner = flow[6:-6, 6:-6]
    assert flow.shape == (48, 64, 2) and np.isfinite(inner).mean() > 0.98
    assert np.nanmean(np.abs(inner - [1.0, 2.0])) < 0.1
    covered = before.copy()
    covered[12:36, 24:44] = np.random.default_rng(1).random((24, 20, 1))  # goes away, and shows what was behind
    hidden = np.isnan(optical_flow(frame, covered))[..., 0]
    assert hidden[14:32, 24:40].mean() > 3 * max(0.01, hidden[:, 48:].mean())
    with pytest.raises(ValueError):
        optical_flow(frame, before[:40])
