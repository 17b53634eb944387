"""ImageTensors files: what is read is what was stored, what is written can be read back, and failures leave nothing behind."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms
from PIL.ExifTags import IFD, Base

from qartsr_pipeline.image_files import ImageFile, ImageFileError, Metadata, check_writable, read_image, write_image

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def random_pixels(channels, dtype=np.uint16, size=(19, 23), seed=0):
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (*size, channels), dtype=dtype, endpoint=True)


def as_result(pixels):
    """(H, W, C) of integers -> what the pipeline would deliver for them: RGB or RGBA floats."""
    values = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if pixels.shape[2] <= 2:
        values = np.concatenate([values[..., :1].repeat(3, -1), values[..., 1:]], -1)
    return values


def camera_exif(orientation=6):
    exif = Image.Exif()
    exif[Base.Orientation], exif[Base.Make] = orientation, "Camera"
    exif[Base.ExifOffset] = {Base.ExifImageWidth: 23, Base.ExifImageHeight: 19, Base.ISOSpeedRatings: 100}
    return exif


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_survive_writing_and_reading(tmp_path, suffix, channels):
    pixels = random_pixels(channels)
    path = tmp_path / f"image{suffix}"
    assert write_image(path, as_result(pixels), ImageFile(pixels)) == []
    if channels == 2 and suffix == ".tif":
        assert np.array_equal(tifffile.imread(path), pixels)  # Pillow opens no 16-bit grey TIFF with alpha
        return
    again = read_image(path)
    assert again.sixteen_bit and again.notices == []
    assert np.array_equal(again.pixels, pixels)


@pytest.mark.parametrize("height", [1, 2, 64, 65, 66, 200])
def test_sixteen_bit_png_of_any_height(tmp_path, height):
    pixels = random_pixels(3, size=(height, 3))
    write_image(tmp_path / "a.png", as_result(pixels), ImageFile(pixels))
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, pixels)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_reads_sixteen_bit_tiff_of_another_writer(tmp_path, channels, byteorder, compression):
    pixels = random_pixels(channels)
    options = {"photometric": "rgb" if channels > 1 else "minisblack", "extrasamples": ["unassalpha"] if channels == 4 else []}
    stored = pixels if channels > 1 else pixels[..., 0]
    path = tmp_path / "image.tif"
    predictor = compression is not None
    tifffile.imwrite(path, stored, byteorder=byteorder, compression=compression, predictor=predictor, **options)
    image = read_image(path)
    assert np.array_equal(image.pixels, pixels) and image.notices == []


def png(pixels, filters):
    """A 16-bit RGB PNG whose rows use the given filter types, written in the plainest way."""
    raw = pixels.astype(">u2").view(np.uint8).reshape(len(pixels), -1).astype(int)
    rows = b""
    for y, row in enumerate(raw):
        above = raw[y - 1] if y else np.zeros_like(row)
        left, corner = np.pad(row, (6, 0))[:-6], np.pad(above, (6, 0))[:-6]
        estimate = left + above - corner
        choices = np.stack([left, above, corner])
        paeth = choices[np.abs(choices - estimate).argmin(0), np.arange(row.size)]
        guess = [np.zeros_like(row), left, above, (left + above) // 2, paeth][filters[y % len(filters)]]
        rows += bytes([filters[y % len(filters)]]) + ((row - guess) % 256).astype(np.uint8).tobytes()
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


def test_reads_every_png_filter(tmp_path):
    pixels = random_pixels(3)
    (tmp_path / "a.png").write_bytes(png(pixels, [0, 1, 2, 3, 4]))
    assert np.array_equal(read_image(tmp_path / "a.png").pixels, pixels)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_profile_and_exif_are_kept_upright_and_resized(tmp_path, suffix, dtype):
    source, target = tmp_path / "in.jpg", tmp_path / f"out{suffix}"
    Image.fromarray(random_pixels(3, np.uint8)).save(source, exif=camera_exif(), icc_profile=PROFILE)
    image = read_image(source)
    assert (image.width, image.height) == (19, 23), "orientation 6 turns the image by 90 degrees"
    image.pixels = image.pixels.astype(dtype)
    write_image(target, np.zeros((92, 76, 3), np.float32), image)
    with Image.open(target) as result:
        assert result.info["icc_profile"] == PROFILE
        exif = result.getexif()
        details = exif.get_ifd(IFD.Exif)
    assert exif[Base.Make] == "Camera" and exif[Base.Orientation] == 1
    assert (details[Base.ExifImageWidth], details[Base.ExifImageHeight], details[Base.ISOSpeedRatings]) == (76, 92, 100)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_agrees_with_pillow(tmp_path, orientation):
    from PIL import ImageOps

    path = tmp_path / "turned.png"
    Image.fromarray(random_pixels(3, np.uint8)).save(path, exif=camera_exif(orientation))
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(path).pixels, expected)


def test_structure_of_a_tiff_does_not_leak_into_other_files(tmp_path):
    tifffile.imwrite(tmp_path / "in.tif", random_pixels(3), photometric="rgb", description="a photograph", metadata=None)
    write_image(tmp_path / "out.jpg", np.zeros((8, 8, 3)), read_image(tmp_path / "in.tif"))
    with Image.open(tmp_path / "out.jpg") as image:
        tags = image.getexif()
    assert "a photograph" in tags[Base.ImageDescription] and not {Base.StripOffsets, Base.BitsPerSample} & set(tags)


def test_modes_without_red_green_and_blue(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = read_image(tmp_path / "cmyk.jpg").pixels[2, 2]
    assert read_image(tmp_path / "cmyk.jpg").notices == ["cmyk.jpg has CMYK colours, which become sRGB."]
    assert red[0] > 240 and red[1:].max() < 20
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert read_image(tmp_path / "palette.png").pixels[0, 0].tolist() == [10, 20, 30, 0]
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    assert read_image(tmp_path / "bit.png").pixels.shape == (4, 4, 1)


def test_what_a_format_cannot_hold_is_said(tmp_path):
    source = ImageFile(np.zeros((2, 2, 4), np.uint16), Metadata(icc_profile=PROFILE))
    result = np.zeros((2, 2, 4), np.float32)
    notices = write_image(tmp_path / "a.bmp", result, source)
    assert [any(word in notice for notice in notices) for word in ("transparency", "8 bits", "profile")] == [True] * 3
    assert read_image(tmp_path / "a.bmp").pixels.min() == 255, "fully transparent black over white is white"


def test_only_the_first_frame_is_read_and_that_is_said(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("L", (4, 4), 255)])
    image = read_image(tmp_path / "a.gif")
    assert image.pixels.max() == 0 and "2 frames" in image.notices[0]


def test_bad_files_have_messages_of_their_own(tmp_path, monkeypatch):
    good = tmp_path / "good.png"
    Image.fromarray(random_pixels(3, np.uint8, (64, 64))).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    tifffile.imwrite(tmp_path / "float.tif", np.zeros((4, 4), np.float32))
    tifffile.imwrite(tmp_path / "long.tif", np.full((4, 4), 1 << 20, np.int32))
    for name, expected in {
        "none.png": "no file",
        ".": "is a folder",
        "cut.png": "truncated or damaged",
        "text.png": "not an image",
        "empty.png": "not an image",
        "float.tif": "floating-point",
        "long.tif": "signed",
    }.items():
        with pytest.raises(ImageFileError, match=expected):
            read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageFileError, match="decompression bomb"):
        read_image(good)


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.tif"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, name):
    target = tmp_path / name
    target.write_bytes(b"the old file")
    pixels = random_pixels(3, size=(128, 128))
    resource = pytest.importorskip("resource", reason="Windows has no limits of file sizes")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(ImageFileError, match="The file that was saved before is untouched. A size limit is reached"):
            write_image(target, as_result(pixels), ImageFile(pixels))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert target.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [target]


def test_unwritable_places_are_reported_beforehand(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path, expected in {
        tmp_path / "missing" / "a.png": "does not exist",
        tmp_path / "file" / "a.png": "is a file: choose another folder",
        tmp_path / "folder.png": "That is a folder: choose another name",
        tmp_path / "a.xyz": "does not end in a known image format",
    }.items():
        with pytest.raises(ImageFileError, match=expected):
            check_writable(path)
    with pytest.raises(ImageFileError, match="16383"):
        check_writable(tmp_path / "a.webp", height=10, width=20000)
    check_writable(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_a_write_protected_file_is_not_replaced(tmp_path):
    target = tmp_path / "a.png"
    target.write_bytes(b"kept")
    target.chmod(0o444)
    for write in (check_writable, lambda path: write_image(path, np.zeros((2, 2, 3)), ImageFile(np.zeros((1, 1, 3), np.uint8)))):
        with pytest.raises(ImageFileError, match="write-protected.*change the permissions"):
            write(target)
    assert target.read_bytes() == b"kept" and list(tmp_path.iterdir()) == [target]
    target.chmod(0o644)
    check_writable(target)


def test_no_permission(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageFileError, match="Writing is not allowed there"):
        check_writable(tmp_path / "a.png")
