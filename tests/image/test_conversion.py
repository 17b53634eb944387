"""Whatever is handed in becomes the right ImageTensors, or an error that names the argument."""

import types

import numpy as np
import PIL.Image
import pytest
import torch

from qartsr_pipeline import one_step
from qartsr_pipeline.image.conversion import from_images, to_images, to_pil

RGB = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "PA", "I;16", "I", "CMYK", "YCbCr", "HSV"])
def test_every_pil_mode_survives_the_way_in_and_out(mode):
    source = PIL.Image.fromarray(RGB)
    if mode == "I;16":
        image = PIL.Image.fromarray(np.array([[0, 1, 255], [256, 40000, 65535]], dtype=np.uint16))
    elif mode == "I":
        image = PIL.Image.fromarray(np.array([[0, 1, 255], [256, 40000, 65535]], dtype=np.int32))
    elif mode == "PA":
        image = source.convert("P").convert("PA")
    else:
        image = source.convert(mode)
    (converted,) = to_images(image)
    assert converted.rgb.shape == (1, 3, 2, 3) and converted.rgb.dtype == torch.float32
    assert 0 <= converted.rgb.min() and converted.rgb.max() <= 1
    expected = {"1": "L", "P": "RGB", "PA": "RGBA", "I": "I;16", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB"}.get(mode, mode)
    result = to_pil(converted)
    assert result.mode == expected
    if mode not in ("I", "I;16"):
        assert np.array_equal(np.asarray(result), np.asarray(image.convert(expected)))
    else:
        assert np.array_equal(np.asarray(result).astype(int), np.asarray(image).astype(int))


def test_exif_orientation_turns_the_image_upright():
    image = PIL.Image.fromarray(RGB)
    image.getexif()[0x0112] = 6  # to be rotated by 90 degrees clockwise
    upright = np.asarray(to_pil(to_images(image)[0]))
    assert np.array_equal(upright, np.rot90(RGB, -1))


@pytest.mark.parametrize("mode, transparency, expected", [("P", 0, "RGBA"), ("L", 0, "LA"), ("RGB", (0, 14, 28), "RGBA")])
def test_a_transparent_colour_becomes_alpha(mode, transparency, expected):
    image = PIL.Image.fromarray(RGB)
    if mode != "RGB":
        image = PIL.Image.new(mode, (2, 1))
        image.putpixel((1, 0), 1)
    image.info["transparency"] = transparency
    (converted,) = to_images(image)
    assert converted.alpha is not None and converted.alpha[0, 0, 0, 0] == 0 and converted.alpha.max() == 1
    assert to_pil(converted).mode == expected


@pytest.mark.parametrize("dtype, full", [(np.uint8, 255), (np.uint16, 65535), (np.float16, 1), (np.float32, 1), (np.float64, 1)])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 2), (4, 5, 3), (4, 5, 4), (2, 4, 5, 3)])
def test_numpy_and_torch_agree(dtype, full, shape):
    values = np.random.default_rng(0).random(shape)
    array = (values * full).round().astype(dtype) if full > 1 else values.astype(dtype)
    tensor = torch.from_numpy(array)
    tensor = tensor if array.ndim == 2 else tensor.movedim(-1, -3)
    for one, other in zip(to_images(array), to_images(tensor), strict=True):
        assert torch.equal(one.rgb, other.rgb) and (one.height, one.width) == (4, 5)
        assert (one.alpha is None) == (other.alpha is None) == (shape[-1] not in (2, 4))
        assert one.greyscale == (shape in [(4, 5), (4, 5, 1), (4, 5, 2)])
        assert one.sixteen_bit == (dtype is np.uint16)
    expected = values if values.ndim != 4 else values[0]
    found = to_images(array)[0].rgb[0].permute(1, 2, 0).numpy()
    colours = expected[..., None] if expected.ndim == 2 else expected[..., : (1 if expected.shape[-1] < 3 else 3)]
    assert np.abs(found - colours).max() < 0.003


def test_a_list_may_mix_kinds_sizes_and_batches():
    images = to_images([PIL.Image.new("L", (3, 2)), np.zeros((2, 5, 6, 3)), torch.zeros(4, 1, 1)])
    assert [(image.height, image.width) for image in images] == [(2, 3), (5, 6), (5, 6), (1, 1)]


@pytest.mark.parametrize(
    "image, error, words",
    [
        ("photo.png", TypeError, ["`image`", "str", "Image.open"]),
        (None, TypeError, ["`image`", "NoneType"]),
        ([], ValueError, ["`image`", "empty"]),
        ([np.zeros((2, 2, 3)), 7], TypeError, ["`image[1]`", "int"]),
        (np.zeros((0, 4, 3)), ValueError, ["`image`", "no pixels"]),
        (torch.zeros(1, 3, 0, 4), ValueError, ["no pixels"]),
        (np.zeros((3, 8, 8)), ValueError, ["8 channels", "permute"]),
        (torch.zeros(8, 8, 3), ValueError, ["8 channels", "permute"]),
        (np.zeros((4, 4, 5)), ValueError, ["5 channels"]),
        (np.zeros(4), ValueError, ["shape (4,)"]),
        (np.zeros((4, 4, 3), np.int32), TypeError, ["int32", "uint8"]),
        (np.zeros((4, 4, 3), bool), TypeError, ["bool"]),
        (torch.zeros(3, 4, 4, dtype=torch.int64), TypeError, ["int64"]),
        (np.full((4, 4, 3), np.nan), ValueError, ["NaN"]),
        (np.full((4, 4, 3), np.inf), ValueError, ["infinity"]),
        (np.full((4, 4, 3), 200.0), ValueError, ["200", "255"]),
        (np.full((4, 4, 3), -1.0), ValueError, ["-1", "(x + 1) / 2"]),
        (PIL.Image.new("F", (2, 2)), TypeError, ["mode 'F'"]),
        (PIL.Image.new("I", (2, 2), 70000), ValueError, ["70000", "65535"]),
        (PIL.Image.new("RGB", (0, 3)), ValueError, ["no pixels"]),
    ],
)
def test_bad_images_are_named(image, error, words):
    with pytest.raises(error) as caught:
        to_images(image)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_arrays_are_stacked_only_when_they_are_equal():
    small, large = to_images([np.zeros((2, 2, 3)), np.zeros((3, 3, 3))])
    assert from_images([small, small], "np").shape == (2, 2, 2, 3)
    assert from_images([small, small], "pt").shape == (2, 3, 2, 2)
    assert [one.shape for one in from_images([small, large], "np")] == [(2, 2, 3), (3, 3, 3)]


@pytest.fixture
def upscale(monkeypatch):
    """`upscale_image` with a network that adds coloured noise."""

    def run_tiles(network, padded, *rest):
        return padded + 0.1 * torch.randn(padded.shape, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(one_step, "run_tiles", run_tiles)
    plan = types.SimpleNamespace(multiple=1, minimum=1)
    settings = one_step.Settings(4, 4, None, True, False, None)

    def upscale(image, **options):
        return one_step.upscale_image(None, to_images(image, **options)[0], plan, settings)

    return upscale


def test_an_image_without_colour_gets_none_however_it_is_stored(upscale):
    grey = np.random.default_rng(0).integers(0, 256, (6, 5, 1), dtype=np.uint8)
    colour = grey.repeat(3, -1)
    expected = upscale(grey).rgb
    assert (expected == expected[:, :1]).all()
    for stored in (colour, PIL.Image.fromarray(colour), torch.from_numpy(colour / 255).movedim(-1, 0)):
        result = upscale(stored)
        assert torch.equal(result.rgb, expected) and to_pil(result).mode == "RGB"
    colour[2, 2, 0] ^= 255
    assert (upscale(colour).rgb != expected).any()


def test_colours_under_transparency_are_kept_when_asked_for(upscale):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    rgba[..., 3] = [255] * 3 + [0] * 6
    opaque, replaced = upscale(rgba[..., :3]).rgb, upscale(rgba).rgb
    assert torch.equal(upscale(rgba, keep_hidden_colors=True).rgb, opaque)
    assert (replaced - opaque).abs().max() > 0.05


def test_keep_hidden_colors_is_a_choice(tiny_pipeline):
    with pytest.raises(TypeError, match="`keep_hidden_colors`"):
        tiny_pipeline(np.zeros((2, 2, 4)), keep_hidden_colors="yes")
