"""Modes x depths x orientations x compressions: files of independent writers have the values that the formats mean."""

import io

import numpy as np
import pytest
import tifffile
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from image_kinds import chunk, png_file, turned
from PIL import Image, ImageOps

from qartsr_pipeline.image.conversion import to_images
from qartsr_pipeline.image_files import ImageFileError, read_image
from qartsr_pipeline.versions import release

PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # without explanations, which take a minute
EVERY = settings(max_examples=60, deadline=None, derandomize=True, phases=PHASES, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


def random_values(dtype, shape, seed):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def as_tensor(image):
    """What the pipeline makes of an image, (H, W, 3 or 4) in [0, 1]."""
    found = to_images(image)[0]
    channels = [found.rgb[0], *([found.alpha[0]] if found.alpha is not None else [])]
    return np.concatenate([one.permute(1, 2, 0).numpy() for one in channels], -1)


def as_colour(pixels):
    """(H, W, C) of integers -> (H, W, 3 or 4) in [0, 1]."""
    values = pixels.astype(np.float64) / np.iinfo(pixels.dtype).max
    return np.concatenate([values[..., :1].repeat(3, -1), values[..., 1:]], -1) if values.shape[-1] < 3 else values


@given(
    kind=st.sampled_from(["minisblack", "miniswhite", "rgb", "rgba", "rgbx", "premultiplied"]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    order=st.sampled_from("<>"),
    compression=st.sampled_from([None, "zlib"]),
    orientation=st.integers(1, 8),
    layout=st.sampled_from(["strip", "strips", "tiles", "planes"]),
    seed=st.integers(0, 1000),
)
@EVERY
def test_tiff(folder, kind, dtype, order, compression, orientation, layout, seed):
    path, grey = folder / "a.tif", kind.startswith("minis")
    channels = 1 if grey else 3 if kind == "rgb" else 4
    pixels = random_values(dtype, (37, 21, channels), seed)
    if kind == "premultiplied":
        pixels[..., 3] = np.maximum(pixels[..., 3], 1)
        full = int(np.iinfo(dtype).max)
        pixels[..., :3] = pixels[..., :3].astype(np.uint64) * pixels[..., 3:] // full
    planes = layout == "planes" and not grey
    stored = pixels[..., 0] if grey else np.moveaxis(pixels, -1, 0) if planes else pixels
    extra = {"rgba": ["unassalpha"], "rgbx": ["unspecified"], "premultiplied": ["assocalpha"]}.get(kind)
    tifffile.imwrite(
        path,
        stored,
        byteorder=order,
        photometric=kind if grey else "rgb",
        extrasamples=extra,
        compression=compression,
        planarconfig="separate" if planes else None if grey else "contig",
        extratags=[(274, 3, 1, orientation, True)],
        **{"strips": {"rowsperstrip": 8}, "tiles": {"tile": (16, 16)}}.get(layout, {}),
    )
    expected = turned(pixels, orientation)
    if kind == "miniswhite":
        expected = np.iinfo(dtype).max - expected
    try:
        found = read_image(path)
    except ImageFileError as error:
        # What Pillow cannot read is refused, and that is all that may be.
        old = release("Pillow") < (11, 2) and dtype is np.uint16 and kind in ("rgbx", "premultiplied")
        assert old or (dtype is np.uint16 and kind == "miniswhite") or (planes and extra), error
        return
    if kind == "rgbx" and found.pixels.shape[-1] == 3:
        expected = expected[..., :3]
    assert found.pixels.shape == expected.shape
    exact = found.sixteen_bit == (dtype is np.uint16)
    assert exact or found.notices, "a loss is said"
    if kind == "premultiplied":
        alpha = expected[..., 3:].astype(np.float64)
        expected = np.concatenate([expected[..., :3].astype(np.float64) * np.iinfo(dtype).max / alpha, alpha], -1)
        expected = np.rint(np.minimum(expected, np.iinfo(dtype).max)).astype(dtype)
    tolerance = (1.01 if kind == "premultiplied" else 0) / np.iinfo(dtype).max if exact else 1 / 100
    difference = np.abs(as_colour(found.pixels) - as_colour(expected))
    if kind == "premultiplied" and not exact:
        difference *= as_colour(expected)[..., 3:]  # dark places have lost their colours by then
    assert difference.max() <= tolerance
    if kind == "premultiplied":
        return  # Pillow's own division loses precision in dark places
    with Image.open(path) as image:
        try:
            given_to_pipeline = as_tensor(image)
        except TypeError as error:
            assert planes and dtype is np.uint16 and "planes" in str(error)
            return
    given_colour = as_colour(expected)[..., : given_to_pipeline.shape[-1]]
    assert np.abs(given_to_pipeline - given_colour).max() <= 1 / 200


@given(
    depth=st.sampled_from([1, 2, 4, 8, 16]),
    colour_type=st.sampled_from([0, 2, 3, 4, 6]),
    transparent=st.booleans(),
    orientation=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
@EVERY
def test_png(folder, depth, colour_type, transparent, orientation, seed):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour_type]
    depth = min(depth, 8) if colour_type == 3 else depth if colour_type == 0 else max(depth, 8)
    random = np.random.default_rng(seed)
    samples, extra = random.integers(0, 1 << depth, (7, 9, channels)), b""
    full = 65535 if depth == 16 else 255
    expected = samples * full // ((1 << depth) - 1)
    if colour_type == 3:
        palette, alphas = random.integers(0, 256, (1 << depth, 3)), random.integers(0, 256, 1 << depth)
        extra = chunk(b"PLTE", palette.astype(np.uint8).tobytes())
        expected = palette[samples[..., 0]]
        if transparent:
            extra += chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
            expected = np.concatenate([expected, alphas[samples]], -1)
    elif transparent and colour_type in (0, 2):
        key = samples[3, 4]
        extra = chunk(b"tRNS", key.astype(">u2").tobytes())
        opaque = (samples != key).any(-1, keepdims=True)
        expected = np.concatenate([expected, opaque * full], -1)
    exif = Image.Exif()
    exif[274] = orientation
    extra += chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path = folder / "a.png"
    path.write_bytes(png_file(samples, depth, colour_type, extra))
    expected = turned(expected, orientation)
    found = read_image(path)
    assert found.notices == [] and found.sixteen_bit == (depth == 16)
    assert np.array_equal(found.pixels, expected)
    with Image.open(path) as image:
        given_to_pipeline = as_tensor(image)
    colour = as_colour(expected.astype(np.uint16 if depth == 16 else np.uint8))
    # Pillow hands over the high bytes of 16-bit colour, so a transparent colour is found only among those.
    channels = 3 if depth == 16 and colour_type == 2 else colour.shape[-1]
    assert given_to_pipeline.shape == colour.shape
    assert np.abs(given_to_pipeline - colour)[..., :channels].max() <= 1 / 200
    if depth == 16 and colour_type == 2 and transparent:
        assert not given_to_pipeline[..., 3][colour[..., 3] == 0].any()


def grey_tiff(values, bits, photometric=1):
    """A little-endian grey TIFF file; `values` are as they are stored, rows of whole bytes."""
    from PIL import TiffImagePlugin

    height, width = values.shape
    numbers = values.astype(np.int64).reshape(height, -1)
    if bits % 8:
        data = np.packbits(((numbers[..., None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8).reshape(height, -1), axis=1)
    else:
        data = numbers.astype(f"<u{bits // 8}")
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 273: 0, 279: data.nbytes}
    for tag, value in tags.items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + data.tobytes()


@pytest.mark.parametrize("bits, photometric", [(12, 1), (16, 0), (16, 1), (8, 0), (4, 0), (2, 1), (1, 0)])
def test_greys_of_other_ranges(folder, bits, photometric):
    values = np.random.default_rng(0).integers(0, 1 << bits, (5, 8))
    (folder / "grey.tif").write_bytes(grey_tiff(values, bits, photometric))
    expected = values / ((1 << bits) - 1)
    expected = expected if photometric else 1 - expected
    found = read_image(folder / "grey.tif")
    assert np.abs(found.pixels[..., 0] / np.iinfo(found.pixels.dtype).max - expected).max() < 1e-5 and not found.notices
    with Image.open(folder / "grey.tif") as image:
        assert np.abs(as_tensor(image)[..., 0] - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int16, np.int8, np.float32])
def test_values_whose_range_nobody_knows_are_refused(folder, dtype):
    tifffile.imwrite(folder / "range.tif", np.ones((4, 4), dtype), photometric="minisblack")
    with pytest.raises(ImageFileError, match="whose range is not known. Convert it"):
        read_image(folder / "range.tif")
    with Image.open(folder / "range.tif") as image, pytest.raises(TypeError, match="`image` has mode"):
        to_images(image)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "group4", "jpeg", "tiff_ccitt"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_compressions_of_scanners(folder, compression, orientation):
    bilevel = compression in ("group4", "tiff_ccitt")
    shape = (16, 24) if bilevel else (16, 24, 3)
    pixels = np.kron(random_values(np.uint8, (2, 3, *shape[2:]), 0), np.ones((8, 8, 1) if not bilevel else (8, 8)))
    pixels = (pixels > 127) if bilevel else pixels.astype(np.uint8)
    Image.fromarray(pixels).save(folder / "scan.tif", compression=compression, tiffinfo={274: orientation})
    found = read_image(folder / "scan.tif").pixels
    stored = pixels[..., None] * 255 if bilevel else pixels
    assert np.abs(found.astype(int) - turned(stored, orientation)).max() <= (20 if compression == "jpeg" else 0)


@pytest.mark.parametrize("name", ["a.jfif", "a.jpe", "a.gif", "a.jp2", "a.avif", "a.tga", "a.qoi", "a.ppm", "a.dib", "a.webp"])
def test_other_formats(folder, name):
    if name == "a.avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    pixels = np.kron(random_values(np.uint8, (2, 3, 3), 0), np.ones((8, 8, 1))).astype(np.uint8)
    image, path = Image.fromarray(pixels), folder / name
    try:
        image.save(path, format="JPEG" if name in ("a.jfif", "a.jpe") else None)
    except (OSError, ValueError, KeyError):
        pytest.skip("this Pillow does not write the format")
    found = read_image(path).pixels
    assert found.shape == pixels.shape and np.abs(found.astype(int) - pixels).mean() < 12


def test_deeper_colour_that_pillow_cannot_deliver_is_said(folder):
    values = random_values(np.uint16, (4, 4, 3), 0)
    (folder / "deep.ppm").write_bytes(b"P6 4 4 65535\n" + values.astype(">u2").tobytes())
    found = read_image(folder / "deep.ppm")
    assert np.abs(found.pixels / 255 - values / 65535).max() < 1 / 200 and "only be read at 8 bits" in found.notices[0]
    (folder / "plain.ppm").write_bytes(b"P6 4 4 255\n" + (values >> 8).astype(np.uint8).tobytes())
    assert read_image(folder / "plain.ppm").notices == []


@pytest.mark.parametrize("channels", [3, 4, 5, 6])
@pytest.mark.parametrize("meaning", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_channels_that_are_not_read_are_counted(folder, channels, meaning, dtype):
    """Photoshop stores masks so."""
    extra = [meaning, *["unspecified"] * 2][: channels - 3]
    options = {"extrasamples": extra} if extra else {}
    tifffile.imwrite(
        folder / "a.tif", random_values(dtype, (9, 8, channels), 0), photometric="rgb", planarconfig="contig", **options
    )
    try:
        found = read_image(folder / "a.tif")
    except ImageFileError as error:
        assert "Convert it to PNG" in str(error) and channels > 3
        return
    said = [one for one in found.notices if "more channel" in one]
    assert len(said) == (found.pixels.shape[2] < channels)
    if said:
        assert f"a.tif has {channels - found.pixels.shape[2]} more" in said[0]


def test_lab_is_converted_by_its_meaning(folder):
    Image.new("LAB", (4, 4), (255, 128, 128)).save(folder / "lab.tif")
    assert read_image(folder / "lab.tif").pixels.min() > 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pillows_images_are_turned_like_pillow_turns_them(orientation):
    image = Image.fromarray(random_values(np.uint8, (3, 5, 3), 0))
    image.getexif()[274] = orientation
    assert np.abs(as_tensor(image) - np.asarray(ImageOps.exif_transpose(image)) / 255).max() < 1e-6


@pytest.mark.parametrize("block", [b"\0\x08\0\x02\x01\x12\0\x03", b"", b"Exif\0\0garbage!", b"II*\0\xff\xff\xff\xff"])
def test_damaged_exif_does_not_reach_the_users_of_the_pipeline(folder, block):
    path = folder / "exif.png"
    path.write_bytes(png_file(np.full((2, 3, 1), 7), 8, 0, chunk(b"eXIf", block)))
    with Image.open(path) as image:
        assert as_tensor(image).shape == (2, 3, 3)
