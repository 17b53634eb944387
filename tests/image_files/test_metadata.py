"""All metadata in, the same bytes out or a word about it: for every format, and for damaged ones."""

import random
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from image_kinds import chunk, exif_block, png_file, short, text
from PIL import Image, ImageCms

from qartsr_pipeline.image_files import ImageFile, ImageFileError, Metadata, exif, png, read_image, write_image

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NAMES = {0x010E: "Zürich, Straße, 日本".encode(), 0x013B: "Jörg Müller".encode("latin-1"), 0x8298: "© 2024 José".encode()}
MAKER_NOTE = b"Maker\0" + bytes(range(256))
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" xmp:Rating="5">日本'.encode()
IPTC = b"\x1c\x02\x78\x00\x07caption" + b"\x1c\x02\x19\x00\x04bird"
PROMPT = "a tree\nSteps: 40, Seed: 1, 日本"


def full_exif(order="<", orientation=6):
    """Texts in several encodings, titles and stars of Windows, resolution, a maker note, sizes, a following preview."""
    ratio = struct.pack(f"{order}2I", 300, 1)
    tags = [short(0x0112, orientation, order), short(0x4746, 5, order), short(0x0128, 2, order)]
    tags += [(0x011A, 5, 1, ratio), (0x011B, 5, 1, ratio), (0x9C9B, 1, 12, "Title\0".encode("utf-16le"))]
    tags += [text(number, value) for number, value in NAMES.items()]
    inner = [(0x927C, 7, len(MAKER_NOTE), MAKER_NOTE), (0xA002, 4, 1, struct.pack(f"{order}I", 20)), short(0xA003, 12, order)]
    return exif_block(tags, order, inner, thumbnail=True)


def full_png(path, order="<"):
    itxt = b"XML:com.adobe.xmp\0\0\0\0\0" + XMP
    iptc = f"\niptc\n{len(IPTC):8}\n{IPTC.hex()}\n".encode()
    chunks = [
        (b"gAMA", struct.pack(">I", 100000)),
        (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
        (b"cICP", bytes([9, 16, 0, 1])),
        (b"pHYs", struct.pack(">IIB", 11811, 11811, 1)),
        (b"eXIf", full_exif(order)),
        (b"iTXt", itxt),
        (b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(iptc)),
        (b"iTXt", b"parameters\0\0\0\0\0" + PROMPT.encode()),
        (b"tEXt", b"workflow\0{}"),
    ]
    path.write_bytes(png_file(np.full((12, 20, 3), 90), 8, 2, b"".join(chunk(*one) for one in chunks)))


def full_jpeg(path, order="<"):
    resource = b"8BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC + bytes(len(IPTC) % 2)
    extra = b"Photoshop 3.0\0" + resource
    extra = b"\xff\xed" + struct.pack(">H", len(extra) + 2) + extra
    block = b"Exif\0\0" + full_exif(order)
    options = {"exif": block, "icc_profile": PROFILE, "xmp": XMP, "comment": b"hello", "dpi": (300, 300), "extra": extra}
    Image.new("RGB", (20, 12), "teal").save(path, **options)


def full_tiff(path, order="<"):
    tags = [(number, 2, len(value) + 1, value + b"\0", True) for number, value in NAMES.items()]
    tags += [(0x4746, 3, 1, 5, True), (700, 7, len(XMP), XMP, True), (33723, 7, len(IPTC), IPTC, True)]
    tags += [(274, 3, 1, 6, True)]
    options = {"resolution": (300, 300), "resolutionunit": 2, "extratags": tags, "metadata": None, "iccprofile": PROFILE}
    tifffile.imwrite(path, np.zeros((12, 20, 3), np.uint8), photometric="rgb", byteorder=order, **options)


def full_webp(path, order="<"):
    options = {"exif": b"Exif\0\0" + full_exif(order), "icc_profile": PROFILE, "xmp": XMP}
    Image.new("RGB", (20, 12), "teal").save(path, **options)


SOURCES = {"png": full_png, "jpg": full_jpeg, "tif": full_tiff, "webp": full_webp}
HELD = {
    "png": {"icc", "exif", "xmp", "iptc", "resolution", "comment", "texts", "colour"},
    "jpg": {"icc", "exif", "xmp", "iptc", "resolution"} | {"comment", "icc"},
    "tif": {"icc", "exif", "xmp", "iptc", "resolution"},
    "webp": {"icc", "exif", "xmp", "resolution"},
}
SAID = {
    "icc": "colour profile",
    "exif": "EXIF",
    "xmp": "XMP",
    "iptc": "IPTC",
    "comment": "comment",
    "resolution": "resolution",
    "texts": "'parameters'",
    "colour": "cICP",
}


def found_in(path):
    """What a file holds, seen without the package: as bytes, through tifffile, or through Pillow."""
    data, found = path.read_bytes(), set()
    upright = XMP.replace(b'Orientation="6"', b'Orientation="1"')
    found |= {"xmp"} if upright in data else set()
    found |= {"iptc"} if IPTC in data or IPTC in inflated(data) else set()
    found |= {"texts"} if PROMPT.encode() in data and b"workflow\0{}" in data else set()
    found |= {"colour"} if all(name in data for name in (b"gAMA", b"cHRM", b"cICP\x09\x10\x00\x01")) else set()
    found |= {"exif"} if all(value in data for value in NAMES.values()) else set()
    if path.suffix == ".tif":
        with tifffile.TiffFile(path) as file:
            tags = {tag.code: tag.value for tag in file.pages[0].tags}
        assert tags.get(274, 1) == 1
        found |= {"icc"} if tags.get(34675) == PROFILE else set()
        numerator, denominator = tags.get(282, (0, 1))
        found |= {"resolution"} if round(numerator / denominator) == 300 else set()
        return found
    with Image.open(path) as image:
        image.load()
        found |= {"icc"} if image.info.get("icc_profile") == PROFILE else set()
        dpi = image.info.get("dpi") or image.getexif().get(0x011A, 0)
        found |= {"resolution"} if round(float(dpi[0] if isinstance(dpi, tuple) else dpi)) == 300 else set()
        found |= {"comment"} if "hello" in str(image.info.get("comment", image.info.get("Comment"))) else set()
        assert image.getexif().get(274, 1) == 1
    return found


def inflated(data):
    """The compressed texts of a PNG file, hexadecimal ones decoded."""
    texts = b""
    for match in re.finditer(rb"zTXtRaw profile type iptc\0\0", data):
        texts += bytes.fromhex(zlib.decompressobj().decompress(data[match.end() :]).split(b"\n", 3)[3].decode())
    return texts


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("target", [*HELD, "bmp"])
@pytest.mark.parametrize("source", SOURCES)
def test_all_in_all_out_or_said(tmp_path, source, target, order):
    original, result = tmp_path / f"in.{source}", tmp_path / f"out.{target}"
    SOURCES[source](original, order)
    there = {
        "png": HELD["png"] - {"icc", "comment"},
        "jpg": HELD["jpg"],
        "tif": HELD["tif"],
        "webp": HELD["webp"],
    }[source]
    file = read_image(original)
    assert file.notices == [] and (file.width, file.height) == (12, 20)
    said = " ".join(write_image(result, np.zeros((80, 48, 3), np.float32), file))
    expected = there & HELD.get(target, {"resolution"})
    assert found_in(result) == expected
    lost = there - expected - ({"colour"} if "icc" in there else set())
    assert {name for name in SAID if SAID[name] in said} == lost


def test_the_documented_table_is_what_the_tests_above_hold():
    page = (Path(__file__).resolve().parents[2] / "docs" / "promises.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \| (yes|no) \|$", page, re.MULTILINE)
    names = {
        "colour profile (ICC)": "icc",
        "EXIF": "exif",
        "XMP": "xmp",
        "IPTC": "iptc",
        "resolution": "resolution",
        "comment": "comment",
        "texts of PNG": "texts",
        "colour of PNG": "colour",
    }
    table = {names[next(name for name in names if row[0].startswith(name))]: row[1:] for row in rows}
    assert set(table) == set(names.values())
    for column, target in enumerate(("png", "jpg", "webp", "tif", "bmp")):
        assert {name for name, cells in table.items() if cells[column] == "yes"} == HELD.get(target, {"resolution"}), target


@pytest.mark.parametrize("order", "<>")
def test_only_orientation_size_and_preview_change_in_an_exif_block(order):
    block = full_exif(order)
    upright, turn = exif.upright(block)
    changed = exif.with_size(upright, 70000, 48)
    different = [place for place in range(len(block)) if block[place] != changed[place]]
    assert turn == 6 and len(changed) == len(block)
    # orientation: 1 byte; width: 1; height from 16 to 32 bits: its type and value; the offset of the preview
    assert 4 <= len(different) <= 8
    assert exif.upright(changed) == (changed, 1)


def test_a_width_in_one_byte_gets_room_for_a_larger_one():
    changed = exif.with_size(exif_block([(0x0100, 1, 1, b"\x14")]), 12, 2000)
    assert exif.with_size(exif_block([(0x0100, 4, 1, struct.pack("<I", 20))]), 12, 2000) == changed


def test_maker_notes_stay_where_they_are_even_in_tiff(tmp_path):
    source = ImageFile(np.zeros((2, 2, 3), np.uint8), Metadata(exif=full_exif()))
    write_image(tmp_path / "a.tif", np.zeros((2, 2, 3)), source)
    assert (tmp_path / "a.tif").read_bytes().find(MAKER_NOTE) == full_exif().find(MAKER_NOTE)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        details = file.pages[0].tags[0x8769].value
    assert details["MakerNote"] == MAKER_NOTE and details["PixelXDimension"] == 2


@pytest.mark.parametrize("order", "<>")
def test_exif_survives_a_way_through_tiff(tmp_path, order):
    source = ImageFile(np.zeros((2, 2, 3), np.uint8), Metadata(exif=full_exif(order)))
    write_image(tmp_path / "a.tif", np.zeros((48, 100, 3)), source)
    write_image(tmp_path / "b.png", np.zeros((5, 7, 3)), read_image(tmp_path / "a.tif"))
    block = read_image(tmp_path / "b.png").metadata.exif
    directories = exif.Directories(block)
    tags = {tag.number: tag for tag in directories.with_children(directories.read(directories.first))}
    assert {number: tags[number].data for number in NAMES} == {number: value + b"\0" for number, value in NAMES.items()}
    inner = {tag.number: tag for tag in tags[0x8769].children}
    assert inner[0x927C].data == MAKER_NOTE and inner[0xA002].integers(order) == (7,) and inner[0xA003].integers(order) == (5,)


VALUES = st.tuples(
    st.integers(0xF000, 0xFFFF), st.sampled_from([(1, 1), (2, 1), (3, 2), (4, 4), (5, 8), (7, 1), (9, 4), (10, 8)]), st.binary()
)


@given(st.lists(VALUES, max_size=12, unique_by=lambda tag: tag[0]), st.sampled_from("<>"), st.integers(1, 8))
@settings(max_examples=25, deadline=None, derandomize=True, database=None, phases=(Phase.generate, Phase.shrink))
def test_any_tag_survives_in_tiff_and_others(tmp_path_factory, values, order, orientation):
    tags = []
    for number, (kind, size), data in values:
        data = data[: len(data) // size * size]
        tags += [(number, kind, len(data) // size, data)] if data else []
    block = exif_block([*tags, short(0x0112, orientation, order)], order)
    path = tmp_path_factory.getbasetemp() / "tags.png"
    path.write_bytes(png_file(np.zeros((3, 5, 1), int), 8, 0, chunk(b"eXIf", block)))
    source = read_image(path)
    assert (source.width, source.height) == ((5, 3) if orientation < 5 else (3, 5))
    assert not write_image(path.with_suffix(".tif"), np.zeros((4, 4, 3)), source)
    directories = exif.Directories(path.with_suffix(".tif").read_bytes())
    kept = {tag.number: (tag.kind, tag.count, tag.data) for tag in directories.read(directories.first)}
    assert all(kept[number] == (kind, count, data) for number, kind, count, data in tags)
    with tifffile.TiffFile(path.with_suffix(".tif")) as file:
        assert {number for number, *_ in tags} <= {tag.code for tag in file.pages[0].tags}
        assert file.pages[0].asarray().shape == (4, 4)


def test_damaged_exif_is_refused_as_such_and_never_otherwise():
    block, chance = full_exif(), random.Random(0)
    for _ in range(2000):
        damaged = bytearray(block[: chance.choice([len(block), chance.randrange(len(block))])])
        for _ in range(chance.randrange(1, 6)):
            if damaged:
                damaged[chance.randrange(len(damaged))] = chance.choice([0, 1, 0xFF, chance.randrange(256)])
        try:
            upright, turn = exif.upright(bytes(damaged))
            assert turn in range(1, 9) and len(upright) == len(damaged)
            exif.with_size(upright, 5, 7)
            exif.resolution(upright)
        except exif.ExifError:
            pass


def test_directories_that_lead_back_to_themselves_end():
    loop = exif_block([(0x8769, 4, 1, struct.pack("<I", 8)), (0xA005, 4, 1, struct.pack("<I", 8)), (0x8825, 4, 1, b"\x08\0\0\0")])
    assert exif.with_size(exif.upright(loop)[0], 3, 4)
    huge = exif_block([(0x9000 + n, 7, 1 << 23, struct.pack("<I", 8)) for n in range(100)]) + bytes(1 << 23)
    with pytest.raises(exif.ExifError, match="too many"):
        exif.upright(huge)


DAMAGED = {
    "exif": chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
    "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n   20\nzzzz\n")),
    "resolution": chunk(b"pHYs", b"\0\0"),
    "gamma": chunk(b"gAMA", b"\0"),
    "profile": chunk(b"iCCP", b"name\0\0not compressed"),
    "checksum": chunk(b"tEXt", b"parameters\0a tree")[:-4] + b"abcd",
    "XMP without languages": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0"),
    "short text": chunk(b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(b"\niptc\n")[:-3]),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("depth", [8, 16])
def test_a_sound_png_with_damaged_metadata_is_read_with_a_notice(tmp_path, name, depth):
    pixels = np.random.default_rng(0).integers(0, 1 << depth, (4, 5, 3))
    (tmp_path / "a.png").write_bytes(png_file(pixels, depth, 2, DAMAGED[name] + chunk(b"tEXt", b"kept\0text")))
    file = read_image(tmp_path / "a.png")
    assert np.array_equal(file.pixels, pixels) and png.keywords(file.metadata.png_chunks) == ["kept"]
    assert len(file.notices) == 1 and "damaged" in file.notices[0]


def test_texts_that_unpack_to_more_than_memory_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(png, "_LARGEST", 1 << 16)
    bomb = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(1 << 20)))
    (tmp_path / "a.png").write_bytes(png_file(np.zeros((2, 2, 1), int), 8, 0, bomb))
    file = read_image(tmp_path / "a.png")
    assert file.metadata.xmp is None and "more than" in file.notices[0]


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_a_sound_file_with_damaged_exif_is_read_with_a_notice(tmp_path, name):
    Image.new("RGB", (8, 6), "teal").save(tmp_path / name, exif=b"Exif\0\0garbage!")
    file = read_image(tmp_path / name)
    assert (file.width, file.height) == (8, 6) and "EXIF data are damaged" in file.notices[0]


def test_large_texts_of_prompts_survive(tmp_path):
    """Pillow refuses a file with more than 1 MiB of compressed text, and ComfyUI's workflows can be larger."""
    workflow = b"workflow\0\0" + zlib.compress(random.Random(0).randbytes(1 << 20).hex().encode())
    (tmp_path / "a.png").write_bytes(png_file(np.zeros((2, 2, 1), int), 8, 0, chunk(b"zTXt", workflow)))
    write_image(tmp_path / "b.png", np.zeros((4, 4, 3)), read_image(tmp_path / "a.png"))
    assert workflow in (tmp_path / "b.png").read_bytes()


def test_what_would_be_wrong_for_the_result_is_not_copied(tmp_path):
    signed = chunk(b"caBX", b"jumb") + chunk(b"abCD", b"?")
    (tmp_path / "a.png").write_bytes(png_file(np.zeros((2, 2, 1), int), 8, 0, signed))
    (notice,) = read_image(tmp_path / "a.png").notices
    assert "C2PA" in notice and "abCD" in notice
    tags = [(33550, 12, 3, (1.0, 1.0, 0.0), True), (37724, 7, 4, b"abcd", True)]
    tifffile.imwrite(tmp_path / "map.tif", np.zeros((4, 4), np.uint8), extratags=tags, metadata=None)
    (notice,) = read_image(tmp_path / "map.tif").notices
    assert "GeoTIFF" in notice and "layers" in notice
    primaries = [(319, 5, 6, (64, 100, 33, 100, 21, 100, 71, 100, 15, 100, 6, 100), True)]
    for profile in (None, PROFILE):
        tifffile.imwrite(
            tmp_path / "a.tif", np.zeros((4, 4, 3), np.uint8), extratags=primaries, metadata=None, iccprofile=profile
        )
        notices = read_image(tmp_path / "a.tif").notices
        assert ("primary colours" in " ".join(notices)) is (profile is None)


def test_metadata_too_large_for_jpeg_are_left_out_and_the_image_is_written(tmp_path):
    large = exif_block([(0x9000, 7, 70000, bytes(70000))])
    source = ImageFile(np.zeros((2, 2, 3), np.uint8), Metadata(exif=large, xmp=bytes(70000)))
    (notice,) = write_image(tmp_path / "a.jpg", np.zeros((2, 2, 3)), source)
    assert "the EXIF data (more than" in notice and "the XMP data (more than" in notice and (tmp_path / "a.jpg").exists()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp", "bmp"])
@settings(deadline=None, max_examples=15, phases=[Phase.explicit, Phase.generate])
@given(pair=st.tuples(*[st.floats(min_value=0, exclude_min=True) | st.just(float("nan"))] * 2))
@example((float("inf"), 72.0))
@example((2.0**32 * 2.54, 72.0))
@example((65535.4, 1e-9))
def test_any_resolution_is_kept_or_named(tmp_path_factory, suffix, pair):
    path = tmp_path_factory.mktemp("resolution") / f"a.{suffix}"
    said = " ".join(write_image(path, np.zeros((2, 2, 3)), ImageFile(np.zeros((1, 1, 3), np.uint8), Metadata(resolution=pair))))
    kept = read_image(path).metadata.resolution
    if kept is None or (suffix == "bmp" and said):  # BMP files always state one: 96
        assert "a resolution of" in said and "pixels per inch" in said
    else:
        assert kept == pytest.approx(pair, rel=0.02, abs=0.5) and not said


def test_a_file_with_an_absurd_resolution_is_enlarged(tmp_path):
    ratio = struct.pack("<2I", 2**32 - 1, 1)  # pixels per centimetre
    block = exif_block([short(0x0128, 3), (0x011A, 5, 1, ratio), (0x011B, 5, 1, ratio)])
    (tmp_path / "a.png").write_bytes(png_file(np.full((2, 2, 3), 90), 8, 2, chunk(b"eXIf", block)))
    source = read_image(tmp_path / "a.png")
    for name in ("b.png", "b.jpg", "b.tif", "b.webp", "b.bmp"):
        said = write_image(tmp_path / name, np.zeros((4, 4, 3)), source)
        assert any("a resolution of 1.09092e+10 x 1.09092e+10 pixels per inch" in one for one in said), name
        assert read_image(tmp_path / name).pixels.shape == (4, 4, 3)


def test_ordinary_colour_chunks_are_no_loss(tmp_path):
    ordinary = chunk(b"gAMA", struct.pack(">I", 45455)) + chunk(b"sRGB", b"\0")
    (tmp_path / "a.png").write_bytes(png_file(np.zeros((2, 2, 1), int), 8, 0, ordinary))
    assert write_image(tmp_path / "a.jpg", np.zeros((2, 2, 3)), read_image(tmp_path / "a.png")) == []


def test_xmp_says_upright_and_the_new_size():
    packet = b"<a tiff:Orientation = '8' exif:PixelXDimension=\"20\"><tiff:Orientation>3</tiff:Orientation><tiff:ImageWidth>20<"
    changed = exif.xmp_with_size(exif.upright_xmp(packet), 48, 80)
    assert changed == packet.replace(b"'8'", b"'1'").replace(b">3<", b">1<").replace(b"20", b"80")


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_files_are_read_or_refused_with_a_message(tmp_path, name):
    SOURCES[name](tmp_path / f"a.{name}")
    data, chance, path = (tmp_path / f"a.{name}").read_bytes(), random.Random(1), tmp_path / f"b.{name}"
    for _ in range(25):
        damaged = bytearray(data[: chance.choice([len(data), chance.randrange(len(data))])])
        for _ in range(chance.randrange(4)):
            damaged[chance.randrange(min(len(damaged), 2000))] = chance.randrange(256)
        path.write_bytes(damaged)
        try:
            file = read_image(path)
            write_image(tmp_path / "c.png", np.zeros((4, 4, 3)), file)
        except ImageFileError as error:
            assert str(path) in str(error)
