"""Both alignments take the tone from the reference and the detail from the image."""

import pytest
import torch
import torch.nn.functional as F

from qartsr_pipeline.image import color_alignment
from qartsr_pipeline.image.color_alignment import align_color, low_pass


@pytest.mark.parametrize("color_fix", ["wavelet", "adain"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (120, 90)])
def test_a_tone_shift_is_undone(color_fix, size):
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    shifted = image + torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1)
    assert torch.allclose(align_color(shifted, image, color_fix), image, atol=1e-5)


def test_none_leaves_the_image_alone():
    image = torch.rand(1, 3, 5, 5)
    assert align_color(image, torch.zeros_like(image), None) is image


def test_wavelet_keeps_detail_of_one_and_tone_of_the_other():
    stripes = torch.zeros(1, 3, 256, 256)
    stripes[..., ::2] = 0.2  # far finer than the low-pass
    reference = torch.linspace(0, 1, 256).view(1, 1, 256, 1).expand_as(stripes)
    aligned = align_color(stripes, reference, "wavelet")
    inner = aligned[..., 64:-64, 64:-64]
    assert torch.allclose(inner[..., ::2] - inner[..., 1::2], torch.full_like(inner[..., ::2], 0.2), atol=1e-4)
    assert torch.allclose(F.avg_pool2d(inner, (1, 2)), reference[..., 64:-64, 64:-64:2], atol=1e-4)


@pytest.mark.parametrize("height", [1, 61, 62, 63, 100, 333])
def test_bands_of_rows_are_the_whole_image(height, monkeypatch):
    monkeypatch.setattr(color_alignment, "BAND_PIXELS", 1)
    image, reference = torch.rand(2, 1, 3, height, 40, generator=torch.Generator().manual_seed(0))
    kept = image.clone(), reference.clone()
    assert torch.equal(align_color(image, reference, "wavelet"), image + low_pass(reference - image))
    assert torch.equal(image, kept[0]) and torch.equal(reference, kept[1])


def test_low_pass_is_the_composed_binomial_kernel():
    impulse = torch.zeros(1, 1, 201, 201)
    impulse[..., 100, 100] = 1
    kernel = low_pass(impulse)[0, 0]
    distance = torch.arange(201.0) - 100
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert (kernel.sum(0) * distance.square()).sum().item() == pytest.approx(0.5 * sum(4**i for i in range(5)), rel=1e-4)
