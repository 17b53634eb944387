"""Exact sizes, Pillow's resampling, padding of the smallest images, and colours that stay under their transparency."""

import numpy as np
import PIL.Image
import pytest
import torch

from qartsr_pipeline.image.resize import enlarge_alpha, enlarged_size, fill_transparent, mirror_indices, pad_to_multiple, resize


@pytest.mark.parametrize("size", [(40, 30), (7, 90), (10, 8)])
def test_resampling_is_pillows(size):
    values = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    expected = np.asarray(PIL.Image.fromarray(values).resize((size[1], size[0]), PIL.Image.Resampling.BICUBIC))
    found = resize(torch.from_numpy(values)[None, None], size)[0, 0].numpy()
    assert np.abs(found - expected).max() < 1e-5


def test_enlarged_size_rounds_and_keeps_one_pixel():
    assert enlarged_size((3, 7), 1.4) == (4, 10)  # 4.2 and 9.8
    assert enlarged_size((1, 1), 0.1) == (1, 1)


@pytest.mark.parametrize("length, wanted", [(1, 5), (2, 5), (4, 9), (4, 17)])
def test_mirror_is_numpys_reflection_and_has_no_limit(length, wanted):
    expected = np.pad(np.arange(length), (0, wanted - length), mode="reflect")
    assert mirror_indices(length, wanted).tolist() == expected.tolist()


def test_padding_reaches_multiple_and_minimum_and_keeps_the_image():
    image = torch.rand(1, 3, 33, 1)
    padded = pad_to_multiple(image, 16, 32)
    assert padded.shape == (1, 3, 48, 32)
    assert torch.equal(padded[..., :33, :1], image)
    assert pad_to_multiple(padded, 16, 32) is padded


@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_colours_under_transparency_do_not_bleed(hidden):
    rgb = torch.full((1, 3, 33, 20), hidden)
    alpha = torch.zeros(1, 1, 33, 20)
    rgb[..., 5:12, 4:9], alpha[..., 5:12, 4:9] = 0.5, 1.0
    enlarged = resize(fill_transparent(rgb, alpha), (132, 80))
    visible = enlarge_alpha(alpha, (132, 80)) > 0
    assert (enlarged - 0.5).abs()[visible.expand_as(enlarged)].max() < 1e-5


def test_visible_colours_are_untouched_and_alpha_is_exact_at_its_ends():
    rgb, alpha = torch.rand(1, 3, 9, 9), torch.ones(1, 1, 9, 9)
    assert fill_transparent(rgb, alpha) is rgb
    assert fill_transparent(rgb, torch.zeros_like(alpha)) is rgb
    alpha[..., :4, :] = 0.3
    alpha[..., 0, :] = 0
    filled = fill_transparent(rgb, alpha)
    assert torch.allclose(filled[..., 1:, :], rgb[..., 1:, :]) and not torch.allclose(filled[..., 0, :], rgb[..., 0, :])
    assert torch.equal(enlarge_alpha(torch.ones(1, 1, 5, 5), (20, 20)), torch.ones(1, 1, 20, 20))
    assert torch.equal(enlarge_alpha(torch.zeros(1, 1, 5, 5), (20, 20)), torch.zeros(1, 1, 20, 20))
