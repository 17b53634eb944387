"""PSNR and SSIM of the luma against scikit-image's, and what they refuse."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qartsr_pipeline.image.metrics import luma, psnr_y, ssim_y


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    image = generator.random((40, 52, 3))
    return image, np.clip(image + 0.1 * generator.standard_normal(image.shape), 0, 1)


def test_luma_of_black_white_and_matlabs_example():
    assert np.allclose(luma(np.zeros((1, 1, 3))) * 255, 16) and np.allclose(luma(np.ones((1, 1, 3))) * 255, 235)
    assert np.allclose(luma(np.array([[[1.0, 0, 0]]])) * 255, 81.481)


@pytest.mark.parametrize("border", [0, 4])
def test_agrees_with_scikit_image(pair, border):
    inner = slice(border, -border or None)
    a, b = (luma(image).numpy()[inner, inner] for image in pair)
    assert psnr_y(*pair, border=border) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
    expected = structural_similarity(a, b, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert ssim_y(*pair, border=border) == pytest.approx(expected, abs=1e-9)


def test_tensors_and_arrays_are_the_same_images(pair):
    tensors = [torch.from_numpy(image).permute(2, 0, 1) for image in pair]
    assert psnr_y(*tensors) == psnr_y(*pair) == psnr_y(tensors[0][None], pair[1])
    assert psnr_y(pair[0], pair[0]) == math.inf and ssim_y(pair[0], pair[0]) == pytest.approx(1)


def test_refuses_what_cannot_be_compared(pair):
    for a, b, message in [
        (pair[0], pair[1][:-1], "differ in size"),
        (pair[0][:8], pair[1][:8], "leaves nothing"),
        (pair[0][..., 0], pair[1][..., 0], "float array"),
        ((pair[0] * 255).astype(np.uint8), pair[1], "float array"),
    ]:
        with pytest.raises(ValueError, match=message):
            psnr_y(a, b)
    with pytest.raises(ValueError, match="11 x 11"):
        ssim_y(pair[0][:18], pair[1][:18])
