"""The processing of OSEDiff's script, written here a second time, tile by tile and filter by filter."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from stable_diffusion_base import adapted_forward

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.convert.conversion import convert_osediff
from qartsr_pipeline.convert.osediff_processing import enlarge, upscale_like_osediff
from qartsr_pipeline.convert.osediff_tiles import gaussian_weights, in_latent_tiles, starts
from qartsr_pipeline.image.color_alignment import align_color


@pytest.fixture(scope="module")
def pipeline(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    torch.save(made.content, folder / "osediff.pkl")
    convert_osediff(made.base, folder / "osediff.pkl", folder / "out", None)
    return QArtSRPipeline.from_pretrained(folder / "out")


def photo(width, height):
    """Smooth, so that nothing depends on a rounding."""
    y, x = np.mgrid[:height, :width] / 10
    return Image.fromarray(np.stack([np.sin(x + c) * 60 + np.cos(y) * 50 + 120 for c in range(3)], -1).astype(np.uint8))


def to_tensor(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)[None] / 255


def blurred(x, step):
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).expand(3, 1, 3, 3) / 16
    return F.conv2d(F.pad(x, (step,) * 4, mode="replicate"), kernel, groups=3, dilation=step)


def low(x):
    for level in range(5):
        x = blurred(x, 2**level)
    return x


def aligned(x, reference, how):
    """StableSR's definitions, which OSEDiff kept."""
    if how == "wavelet":
        return x - low(x) + low(reference)
    mean, deviation = x.mean((2, 3), keepdim=True), (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
    return (x - mean) / deviation * (reference.var((2, 3), keepdim=True) + 1e-5).sqrt() + reference.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("how", ["adain", "wavelet"])
def test_both_alignments_are_defined_as_in_osediff(how):
    x, reference = torch.rand(1, 3, 40, 70), torch.rand(1, 3, 40, 70)
    assert torch.allclose(align_color(x, reference, how), aligned(x, reference, how), atol=1e-5)


@pytest.mark.parametrize("how", ["adain", "wavelet", None])
def test_untiled_it_equals_the_script(made, pipeline, how):
    image = photo(16, 24)
    result = upscale_like_osediff(pipeline, image, process_size=64, color_fix=how, sample_posterior=False)
    large = image.resize((64, 96), Image.Resampling.BICUBIC)
    expected = (adapted_forward(made.adapted, to_tensor(large) * 2 - 1) * 0.5 + 0.5).clamp(0, 1)
    if how:
        expected = aligned((expected * 255).floor() / 255, to_tensor(large), how).clamp(0, 1)
    difference = (to_tensor(result) * 255 - (expected * 255).floor()).abs()
    assert result.size == (64, 96) and difference.max() <= 1 and difference.mean() < 0.01  # 1: float rounding at a step of 8 bits


def test_the_draw_is_that_of_the_default_generator(made, pipeline):
    image = photo(16, 16)
    torch.manual_seed(3)
    result = upscale_like_osediff(pipeline, image, process_size=0, color_fix=None)
    given = torch.Generator().manual_seed(3)
    assert result == upscale_like_osediff(pipeline, image, process_size=0, color_fix=None, generator=given)
    torch.manual_seed(3)
    with torch.no_grad():
        x = to_tensor(image.resize((64, 64), Image.Resampling.BICUBIC)) * 2 - 1
        latents = made.adapted.vae.encode(x).latent_dist.sample() * made.adapted.vae.config.scaling_factor
        network = pipeline.network()
        expected = network.decode(network.step(latents)).clamp(-1, 1) * 0.5 + 0.5
    assert ((expected * 255).floor() - to_tensor(result) * 255).abs().max() <= 1


@pytest.mark.parametrize("size", [(5, 9), (16, 16), (17, 21), (3, 40)])
def test_every_result_has_the_size_asked_for(pipeline, size):
    """OSEDiff's own has not for small pictures and for sides that are no multiples of 8 when enlarged."""
    assert upscale_like_osediff(pipeline, photo(*size), upscale=3, process_size=48).size == (3 * size[0], 3 * size[1])


def test_what_the_network_gets():
    """Pictures below 128 pixels a side are enlarged to that first; then times 4, then down to multiples of 8."""
    sizes = {(100, 300): (512, 1536), (128, 129): (512, 512), (127, 128): (512, 512), (50, 33): (768, 512)}
    assert {size: enlarge(photo(*size), 4, 512).size for size in sizes} == sizes


def test_latent_tiles_as_in_osediff():
    """Against a transcription of the rule: tiles at steps of tile - overlap, the last one moved back; weighted by Gaussians."""
    tile, overlap, latents = 12, 4, torch.randn(1, 4, 30, 21)

    def function(x):
        assert x.shape[-2:] == (12, 12)
        return x * x.mean()  # differs from tile to tile

    total, weight = torch.zeros(1, 4, 30, 21).double(), torch.zeros(30, 21).double()
    for top in (0, 8, 16, 18):
        for left in (0, 8, 9):
            part = function(latents[..., top : top + 12, left : left + 12])
            for y in range(12):
                for x in range(12):
                    w = math.exp(-((y - 6) ** 2) / 144 / 0.02) * math.exp(-((x - 5.5) ** 2) / 144 / 0.02)
                    total[..., top + y, left + x] += part[..., y, x] * w
                    weight[top + y, left + x] += w
    assert torch.allclose(in_latent_tiles(function, latents, tile, overlap), (total / weight).float(), atol=1e-5)


def test_latent_tiles_at_the_edges():
    seen = []

    def function(x):
        seen.append(tuple(x.shape[-2:]))
        return x

    latents = torch.randn(1, 4, 40, 10)
    assert in_latent_tiles(function, latents, 20, 4) is latents and seen == [(40, 10)], "the area decides, as in OSEDiff"
    assert torch.allclose(in_latent_tiles(function, latents, 16, 4), latents) and set(seen[1:]) == {(10, 10)}
    assert starts(96, 96, 32) == [0] and starts(97, 96, 32) == [0, 1] and starts(224, 96, 32) == [0, 64, 128]
    assert gaussian_weights(96).shape == (96, 96)
    with pytest.raises(ValueError, match="cannot overlap"):
        in_latent_tiles(function, latents, 16, 10)
    with pytest.raises(ValueError, match="cannot overlap by -1"):
        in_latent_tiles(function, latents, 16, -1)
    with pytest.raises(ValueError, match="`upscale`"):
        upscale_like_osediff(None, photo(8, 8), upscale=2.5)
    with pytest.raises(ValueError, match="`color_fix` must be 'wavelet', 'adain' or None, but is 'nofix'"):
        upscale_like_osediff(None, photo(8, 8), color_fix="nofix")


def test_tiled_equals_untiled_averaged_noise(pipeline):
    """Averaging z_H is averaging the noise, as OSEDiff does."""
    network = pipeline.network()
    latents = torch.randn(1, 4, 24, 32)

    def noise(z):
        return pipeline.unet(z, 999, encoder_hidden_states=pipeline.prompt_embedding(1)).sample

    with torch.no_grad():
        eps = in_latent_tiles(noise, latents, 16, 8)
        alpha = network.alpha_bar
        expected = (latents - math.sqrt(1 - alpha) * eps) / math.sqrt(alpha)
        assert torch.allclose(in_latent_tiles(network.step, latents, 16, 8), expected, rtol=1e-4, atol=1e-3)


def test_large_pictures_go_through_the_vae_in_tiles(pipeline):
    """As OSEDiff's do; without tiles there are no borders."""
    image = photo(35, 16)
    options = {"process_size": 0, "color_fix": None, "sample_posterior": False}
    whole = upscale_like_osediff(pipeline, image, vae_encoder_tile=None, vae_decoder_tile=None, **options)
    assert whole == upscale_like_osediff(pipeline, image, **options), "140 pixels are one tile"
    tiled = upscale_like_osediff(pipeline, image, vae_encoder_tile=64, vae_decoder_tile=32, **options)
    assert tiled.size == whole.size and tiled != whole
