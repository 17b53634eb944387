"""Training data: procedural images, degradations, patches, pairs, and what records say of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qartsr_pipeline.calibration.data import DEGRADATION_NAMES
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves, power_law_radii
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS, bicubic_degradation, convolve, gaussian_kernel
from qartsr_pipeline.calibration.data.fingerprint import data_fingerprint
from qartsr_pipeline.calibration.data.pairs import MARGIN, TrainingData, degraded_pair, held_out_pairs
from qartsr_pipeline.calibration.data.patches import (
    ImagePatches,
    MixedPatches,
    PhotographPatches,
    images_record,
    list_photographs,
    pixels_of,
    read_photograph,
)
from qartsr_pipeline.image_files import ImageFileError


def spectral_slope(images: np.ndarray) -> float:
    """Slope of log power over log frequency, mean over images (N, S, S)."""
    side = images.shape[-1]
    window = np.hanning(side)[:, None] * np.hanning(side)[None]
    centred = (images - images.mean((-1, -2), keepdims=True)) * window
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


def test_command_lines_know_every_degradation():
    assert tuple(DEGRADATIONS) == DEGRADATION_NAMES


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


def in_memory(paths):
    """Four images, of three kinds."""
    pixels = [read_photograph(path) for path in paths]
    tensor = torch.from_numpy(pixels[1].copy()).permute(2, 0, 1).float() / 255
    return [Image.fromarray(pixels[0]), tensor, *pixels[2:]]


def test_images_in_memory_give_the_patches_of_their_files(photographs):
    paths = list_photographs(photographs)
    source = ImagePatches(in_memory(paths))
    patches = source.sample(6, 48, np.random.default_rng(0))
    assert patches.shape == (6, 3, 48, 48) and patches.dtype == torch.float32
    assert torch.equal(patches, PhotographPatches(paths).sample(6, 48, np.random.default_rng(0)))
    assert not torch.equal(patches, source.sample(6, 48, np.random.default_rng(1)))
    with pytest.raises(ValueError, match="no image is at least 300 pixels high and wide"):
        source.sample(1, 300, np.random.default_rng(0))


def test_large_images_are_also_used_at_half_size():
    large = np.zeros((40, 1024, 3), np.uint8)
    assert [image.shape[:2] for image in ImagePatches([large, large[:, :1000]]).images] == [(40, 1024), (20, 512), (40, 1000)]


def test_record_of_images_knows_pixels_sizes_and_order(photographs):
    images = in_memory(list_photographs(photographs))
    record = images_record(images)
    assert record["count"] == 4 and record == images_record(read_photograph(path) for path in list_photographs(photographs))
    changed = images[3].copy()
    changed[0, 0, 0] ^= 1
    reshaped = images[3].reshape(images[3].shape[1], images[3].shape[0], 3)
    others = [images[::-1], [*images[:3], changed], [*images[:3], reshaped]]
    assert len({record["sha256"], *(images_record(other)["sha256"] for other in others)}) == 4


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_training_data_hold_images_out(photographs, kind):
    paths = list_photographs(photographs)
    loaded = TrainingData(photographs if kind == "files" else in_memory(paths), held_out=1).load()
    assert len(loaded.patches.images) == 3, "the one held out is not trained on"
    assert not any(np.array_equal(image, read_photograph(paths[0])) for image in loaded.patches.images)
    assert torch.equal(loaded.held_out[0][1], held_out_pairs(paths[:1], "bicubic")[0][1])
    assert loaded.record["held_out"] == (["picture_0.png"] if kind == "files" else [0])
    assert loaded.record["data"]["count"] == 4 and ("files" in loaded.record["data"]) == (kind == "files")


def test_training_data_of_every_share(photographs):
    procedural = TrainingData(held_out=2).load()
    assert isinstance(procedural.patches, DeadLeaves) and len(procedural.held_out) == 2 and procedural.record["data"] is None
    assert isinstance(TrainingData(photographs, 1.0, held_out=4).load().patches, DeadLeaves)
    mixed = TrainingData(photographs, 0.5, held_out=1).load().patches
    assert isinstance(mixed, MixedPatches) and mixed.share == 0.5
    with pytest.raises(ValueError, match="all 4 images are kept for validation"):
        TrainingData(photographs, held_out=4).load()


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
    with pytest.raises(ImageFileError, match="cut.png is truncated or damaged"):
        read_photograph(tmp_path / "cut.png")


def test_one_image_by_itself_is_one_image():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for given in (image, torch.from_numpy(image).permute(2, 0, 1), Image.fromarray(image)):
        (pixels,) = pixels_of(given)
        assert np.array_equal(pixels, image)
