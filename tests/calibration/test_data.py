"""Procedural pictures, degradations, pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves, power_law_radii
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS, bicubic_degradation
from qartsr_pipeline.calibration.data.filters import convolve, gaussian_kernel
from qartsr_pipeline.calibration.data.fingerprint import data_fingerprint
from qartsr_pipeline.calibration.data.pairs import MARGIN, degraded_pair, held_out_pairs
from qartsr_pipeline.calibration.data.patches import MixedPatches
from qartsr_pipeline.calibration.data.photographs import list_photographs, read_photograph
from qartsr_pipeline.image_files import PictureError


def spectral_slope(pictures: np.ndarray) -> float:
    """Slope of log power over log frequency, mean over pictures (N, S, S)."""
    side = pictures.shape[-1]
    window = np.hanning(side)[:, None] * np.hanning(side)[None]
    centred = (pictures - pictures.mean((-1, -2), keepdims=True)) * window
    power = (np.abs(np.fft.rfft2(centred)) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    edges = np.geomspace(3 / side, 0.25, 10)
    rings = [(frequency >= low) & (frequency < high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    means = [(frequency[ring].mean(), power[ring].mean()) for ring in rings]
    return float(np.polyfit(*np.log(np.array(means)).T, 1)[0])


def test_dead_leaves_have_the_statistics_of_photographs():
    patches = DeadLeaves().sample(32, 128, np.random.default_rng(0))
    assert patches.shape == (32, 3, 128, 128) and patches.dtype == torch.float32
    assert patches.min() >= 0 and patches.max() <= 1
    assert ((patches == 0) | (patches == 1)).float().mean() < 0.1, "clipped"
    assert spectral_slope(patches.double().mean(1).numpy()) == pytest.approx(-2, abs=0.5)
    assert 0.3 < patches.mean() < 0.65 and 0.15 < patches.mean(1).std() < 0.35
    assert (patches.amax(1) - patches.amin(1)).mean() > 0.05, "colourless"
    assert patches.flatten(1).std(1).min() > 0.01, "an empty patch"


def test_dead_leaves_depend_on_the_generator_alone():
    first, second = (DeadLeaves().sample(3, 40, np.random.default_rng(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, DeadLeaves().sample(3, 40, np.random.default_rng(8)))
    assert DeadLeaves().sample(1, 1, np.random.default_rng(0)).shape == (1, 3, 1, 1)


def test_radii_follow_the_power_law():
    radii = power_law_radii(100_000, 2.0, 200.0, np.random.default_rng(0))
    assert radii.min() >= 2 and radii.max() <= 200.01
    for radius in (4.0, 10.0):  # the share above r falls with r^-2
        assert (radii > radius).mean() == pytest.approx((2 / radius) ** 2, rel=0.05)


@pytest.mark.parametrize("name", DEGRADATIONS)
@pytest.mark.parametrize("size", [(96, 64), (8, 12)])
def test_degradations_keep_their_contract(name, size):
    high = DeadLeaves().sample(3, 96, np.random.default_rng(0))[..., : size[0], : size[1]]
    untouched = high.clone()
    low, again = (DEGRADATIONS[name](high, 4, np.random.default_rng(1)) for _ in range(2))
    assert torch.equal(high, untouched)
    assert low.shape == (3, 3, size[0] // 4, size[1] // 4) and low.dtype == torch.float32
    assert torch.equal(low, again)
    assert torch.equal((low * 255).round() / 255, low) and low.min() >= 0 and low.max() <= 1


def test_real_world_degradation_is_worse_than_bicubic_but_in_place():
    high = DeadLeaves().sample(24, 96, np.random.default_rng(3))
    bicubic = bicubic_degradation(high)
    real = DEGRADATIONS["realesrgan"](high, 4, np.random.default_rng(0))
    assert not torch.equal(real, DEGRADATIONS["realesrgan"](high, 4, np.random.default_rng(1)))
    errors = (real - bicubic).square().mean((1, 2, 3))
    assert errors.min() > 1e-5 and errors.std() > 0.1 * errors.mean(), "not all alike"
    centred = bicubic - bicubic.mean((-1, -2), keepdim=True)

    def agreement(dy: int, dx: int) -> float:
        return float((centred * real.roll((dy, dx), (-2, -1)))[..., 2:-2, 2:-2].mean())

    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    assert max(shifts, key=lambda shift: agreement(*shift)) == (0, 0), "displaced"


def test_bicubic_is_pillows():
    patch = DeadLeaves().sample(1, 64, np.random.default_rng(2))[0].permute(1, 2, 0).numpy()
    pixels = (patch * 127 + 64).round().astype(np.uint8)  # Pillow clips between its two passes; here nothing is clipped
    expected = np.asarray(Image.fromarray(pixels).resize((16, 16), Image.Resampling.BICUBIC), np.float32)
    low = bicubic_degradation(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
    assert np.abs(low[0].permute(1, 2, 0).numpy() * 255 - expected).max() <= 1.01


def test_gaussian_kernels_turn():
    kernel = gaussian_kernel(3.0, 1.0, np.pi / 2)
    assert kernel.sum() == pytest.approx(1) and torch.allclose(kernel, gaussian_kernel(1.0, 3.0), atol=1e-6)
    constant = torch.full((1, 3, 5, 7), 0.25)
    assert torch.allclose(convolve(constant, kernel), constant, atol=1e-6)


def test_mixed_patches_have_the_share_asked_for():
    class Constant:
        def __init__(self, value):
            self.value = value

        def sample(self, count, size, rng):
            return torch.full((count, 3, size, size), self.value)

    mixed = MixedPatches(Constant(0.0), Constant(1.0), 0.3)
    batches = torch.stack([mixed.sample(5, 4, np.random.default_rng(seed)) for seed in range(400)])
    assert batches.mean() == pytest.approx(0.3, abs=0.02)
    assert batches[:, 0].mean() == pytest.approx(0.3, abs=0.1), "not in random order"


def test_pairs_are_aligned_and_reproducible(photographs, tmp_path):
    up, target = degraded_pair(DeadLeaves().sample(2, 64 + 2 * MARGIN, np.random.default_rng(0)))
    assert up.shape == target.shape == (2, 3, 64, 64) and target.min() >= -1 and target.max() <= 1
    assert (up - target).abs().mean() < 0.2
    paths = list_photographs(photographs)
    first, second = (held_out_pairs(paths[:2], "realesrgan") for _ in range(2))
    assert first[0][0].shape == (1, 3, 160, 160)
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    Image.new("RGB", (47, 300)).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small\.png has 47 x 300 pixels; validation needs 48 x 48"):
        held_out_pairs([tmp_path / "small.png"], "bicubic")


def test_fingerprint_knows_contents_and_names(photographs, tmp_path):
    paths = list_photographs(photographs)
    whole = data_fingerprint(paths)
    assert whole["count"] == 4 and whole == data_fingerprint(paths[::-1])
    copy = tmp_path / "other_name.png"
    copy.write_bytes(paths[0].read_bytes())
    assert data_fingerprint([copy, *paths[1:]])["sha256"] != whole["sha256"]


def test_photographs_of_every_kind_become_rgb_of_eight_bits(tmp_path):
    grey = np.linspace(0, 65535, 30, dtype=np.uint16).reshape(5, 6)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_photograph(tmp_path / "grey.png"), np.repeat(np.round(grey[..., None] / 257), 3, axis=2))
    Image.new("RGBA", (4, 3), (1, 2, 3, 0)).save(tmp_path / "alpha.png")
    assert read_photograph(tmp_path / "alpha.png").reshape(-1, 3).tolist() == [[1, 2, 3]] * 12
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:60])
    with pytest.raises(PictureError, match="cut.png is truncated or damaged"):
        read_photograph(tmp_path / "cut.png")
