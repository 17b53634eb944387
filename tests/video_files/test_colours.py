"""Colours, bits, shape and direction: no shift of range or matrix, 10 bits stay 10, HDR stays HDR, frames are upright."""

from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")

from clips import GREY, RED, TEAL, enlarge, flat, frames_of, make_clip, moving  # noqa: E402

from qartsr_pipeline.video_files import VideoFileError  # noqa: E402
from qartsr_pipeline.video_files.colour import LUMA, Colour  # noqa: E402
from qartsr_pipeline.video_files.pixels import UnreadablePixels, kind_of, to_rgb  # noqa: E402
from qartsr_pipeline.video_files.reading import open_clip  # noqa: E402

LOSSLESS = {"codec": "ffv1", "options": {}}
SHARES = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
PATCHES = [flat(colour) for colour in (GREY, RED, TEAL, (0, 0, 0), (1, 1, 1))]
SCREEN = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"


def tags(path):
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        return int(frame.colorspace), int(frame.color_range), int(context.color_primaries), int(context.color_trc)


@pytest.mark.parametrize("matrix", SHARES)
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("format", ["yuv420p", "yuv444p10le"])
def test_colours_are_those_of_the_standard(tmp_path, matrix, full, format):
    source = make_clip(
        tmp_path / "a.mkv", PATCHES, **LOSSLESS, format=format, tags=(matrix, 1, 1), shares=SHARES[matrix], full=full
    )
    step = 1 / 219 if "10" not in format else 1 / 876
    for (_, found), expected in zip(frames_of(source), PATCHES, strict=True):
        assert np.abs(found - expected).max() < 2 * step  # two roundings: of luma and of chroma
        assert abs(float((found - expected).mean())) < step


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(("codec", "suffix"), [("h264", ".mp4"), ("hevc", ".mov"), ("ffv1", ".mkv")])
def test_nothing_shifts_over_five_round_trips(tmp_path, matrix, full, codec, suffix):
    source = make_clip(
        tmp_path / "0.mkv", PATCHES, **LOSSLESS, format="yuv420p", tags=(matrix, matrix, matrix), shares=SHARES[matrix], full=full
    )
    path = source
    for index in range(5):
        following = tmp_path / f"{index + 1}{suffix}"
        enlarge(path, following, 1, codec=codec, crf=None if codec == "ffv1" else 1)
        path = following
    assert tags(path) == (matrix, 2 if full else 1, matrix, matrix)
    for (_, found), (_, expected) in zip(frames_of(path), frames_of(source), strict=True):
        assert np.abs(found - expected).mean(axis=(0, 1)).max() < 1.5 / 255


def test_untagged_small_clips_get_the_matrix_that_players_assumed(tmp_path):
    source = make_clip(tmp_path / "a.mkv", PATCHES, **LOSSLESS, tags=(2, 2, 2), shares=SHARES[6], tag_range=False)
    enlarge(source, tmp_path / "b.mp4")
    assert tags(source)[:2] == (2, 0) and tags(tmp_path / "b.mp4")[:2] == (6, 1)
    assert np.abs(frames_of(source)[1][1] - PATCHES[1]).max() < 2 / 219


def test_a_ramp_in_full_steps_is_the_same_afterwards(tmp_path):
    ramp = np.repeat(np.arange(256, dtype=np.float32)[None, :, None] / 255, 16, 0).repeat(3, 2)
    source = make_clip(tmp_path / "a.mkv", [ramp], **LOSSLESS, full=True)
    enlarge(source, tmp_path / "b.mkv", 1, codec="ffv1")
    with av.open(str(source)) as a, av.open(str(tmp_path / "b.mkv")) as b:
        planes = [next(c.decode(video=0)).to_ndarray() for c in (a, b)]
    assert (planes[0] == planes[1]).all()


@pytest.mark.parametrize("format", ["yuv420p10le", "yuv422p10le", "yuv444p12le"])
@pytest.mark.parametrize("codec", ["hevc", "ffv1"])
def test_ten_and_twelve_bits_stay(tmp_path, format, codec):
    ramp = np.repeat(np.linspace(0.3, 0.4, 64, dtype=np.float32)[None, :, None], 32, 0).repeat(3, 2)
    source = make_clip(tmp_path / "a.mkv", [ramp], **LOSSLESS, format=format)
    enlarge(source, tmp_path / "b.mkv", codec=codec, crf=None if codec == "ffv1" else 2)
    with av.open(str(tmp_path / "b.mkv")) as container:
        frame = next(container.decode(video=0))
    assert frame.format.name == format
    assert len(np.unique(frames_of(tmp_path / "b.mkv")[0][1][..., 1])) > 60  # 8 bits would leave 22 steps


def test_ten_bits_are_written_as_hevc_unless_asked_otherwise(tmp_path):
    source = make_clip(tmp_path / "a.mkv", moving(2), **LOSSLESS, format="yuv420p10le")
    enlarge(source, tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "hevc"
        assert container.streams.video[0].codec_context.codec_tag == "hvc1"


def test_sixteen_bits_are_kept_or_it_is_said(tmp_path):
    source = make_clip(tmp_path / "a.mkv", moving(2), **LOSSLESS, format="yuv444p16le")
    assert enlarge(source, tmp_path / "b.mkv", codec="ffv1") == [] and open_clip(tmp_path / "b.mkv").kind.depth == 16
    (said,) = enlarge(source, tmp_path / "c.mp4", codec="hevc")
    assert "hevc holds 12 bits, the clip has 16. --codec ffv1 keeps them in a .mkv" in said


@pytest.mark.parametrize(("codec", "option"), [("h264", "x264-params"), ("hevc", "x265-params"), ("av1", "svtav1-params")])
def test_hdr_stays_hdr(tmp_path, codec, option):
    ramp = np.repeat(np.linspace(0.1, 0.75, 64, dtype=np.float32)[None, :, None], 64, 0).repeat(3, 2)
    source = make_clip(
        tmp_path / "a.mkv",
        [ramp, ramp],
        codec="libx265",
        format="yuv420p10le",
        tags=(9, 9, 16),
        shares=SHARES[9],
        options={"x265-params": f"log-level=none:master-display={SCREEN}:max-cll=1000,400"},
    )
    clip = open_clip(source)
    assert clip.colour.is_hdr and clip.hdr.light == (1000, 400) and clip.hdr.luminance == (Fraction(1, 200), 1000)
    enlarge(source, tmp_path / "b.mp4", codec=codec)
    result = open_clip(tmp_path / "b.mp4")
    assert result.colour == clip.colour and result.kind.depth == 10
    assert result.hdr.light == (1000, 400) and all(
        abs(a - b) < Fraction(1, 1000)
        for pair, other in zip(result.hdr.primaries, clip.hdr.primaries, strict=True)
        for a, b in zip(pair, other, strict=True)
    )
    assert np.abs(frames_of(tmp_path / "b.mp4")[0][1] - ramp.repeat(2, 0).repeat(2, 1)).mean() < 0.01
    for name in ("b.gif", "b_%03d.png"):
        with pytest.raises(VideoFileError, match="HDR"):
            enlarge(source, tmp_path / name)


def test_rgb_and_grey(tmp_path):
    source = make_clip(tmp_path / "a.mkv", PATCHES, codec="ffv1", format="bgr0", options={}, tags=(0, 1, 13), full=True)
    enlarge(source, tmp_path / "b.mkv", codec="ffv1")
    enlarge(source, tmp_path / "b.mp4", crf=1)
    for name, tolerance in (("b.mkv", 0.6 / 255), ("b.mp4", 3 / 255)):
        for (_, found), expected in zip(frames_of(tmp_path / name), PATCHES, strict=True):
            assert np.abs(found - expected.repeat(2, 0).repeat(2, 1)).max() < tolerance
    grey = make_clip(tmp_path / "grey.mkv", [flat((0.4,) * 3)], codec="ffv1", format="gray", options={}, full=True)
    enlarge(grey, tmp_path / "grey.mp4")
    assert np.abs(frames_of(tmp_path / "grey.mp4")[0][1] - 0.4).max() < 2 / 255


@pytest.mark.parametrize("name", ["ya8", "ya16le", "ya16be", "p012le", "p216be", "p410le", "nv20be", "yuva444p10le"])
def test_formats_with_channels_beside_each_other_or_in_planes(name):
    rows, columns = np.mgrid[:16, :32]
    smooth = np.stack([60 + 3 * columns, 90 + 2 * rows, 150 - columns], -1).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(smooth, "rgb24").reformat(format=name, dst_colorspace=5)
    kind = kind_of(name)
    found, expected = to_rgb(frame, Colour(6, full_range=kind.chroma == "grey")), smooth / 255
    if kind.chroma == "grey":
        expected = (expected @ [0.299, 0.587, 0.114])[..., None]
    assert found.shape == (16, 32, 3) and np.abs(found - expected).mean() < 0.01


def test_transparency_of_grey_pixels():
    frame = av.VideoFrame(16, 16, "ya8")
    plane = frame.planes[0]
    plane.update(bytes((51, 0, 51, 255) * 8 * 16) + bytes(plane.buffer_size - 512))
    found = to_rgb(frame, Colour(6, True))
    assert (found[:, ::2] == 1).all() and np.abs(found[:, 1::2] - 0.2).max() < 1e-6


@pytest.mark.parametrize("name", ["rgb4", "rgb565be", "yuv444p10msble", "gbrp12msbbe"])
def test_formats_that_would_be_misread_are_refused(name):
    if name not in av.video.format.names:
        pytest.skip("this FFmpeg does not know it")
    with pytest.raises(UnreadablePixels, match=name):
        kind_of(name)


def test_what_has_no_colour_is_exactly_grey():
    frame = av.VideoFrame(16, 16, "yuv420p")
    for plane, value in zip(frame.planes, (77, 128, 128), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    for matrix in LUMA:
        found = to_rgb(frame, Colour(matrix, False))
        assert (found == found[0, 0, 0]).all()


def test_pixels_that_are_not_square(tmp_path):
    def anamorphic(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)

    source = make_clip(tmp_path / "a.mp4", moving(2), setup=anamorphic)
    enlarge(source, tmp_path / "b.mp4")
    assert open_clip(tmp_path / "b.mp4").aspect == open_clip(source).aspect == Fraction(16, 11)
    said = enlarge(source, tmp_path / "c.mkv", codec="ffv1")
    assert any("16/11" in notice and "stretched" in notice for notice in said)
    for name in ("d.gif", "e_%d.png"):
        said = enlarge(source, tmp_path / name)
        assert any("16/11" in notice and "stretched" in notice for notice in said), name


# What phones write: the matrix, and where the stored top left corner is shown.
TURNS = {
    90: ((0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30), (0, -1)),
    180: ((-65536, 0, 0, 0, -65536, 0, 0, 0, 1 << 30), (-1, -1)),
    270: ((0, -65536, 0, 65536, 0, 0, 0, 0, 1 << 30), (-1, 0)),
    "mirrored": ((-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), (0, -1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_frames_are_written_upright(tmp_path, turn):
    matrix, corner = TURNS[turn]
    marked = flat(GREY, 32, 64)
    marked[:16, :16] = 1

    def turned(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    source = make_clip(tmp_path / "a.mp4", [marked] * 2, setup=turned)
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the display matrix of the first track
    data[at : at + 36] = np.array(matrix, ">i4").tobytes()
    source.write_bytes(data)
    enlarge(source, tmp_path / "b.mp4")
    (_, found), *_ = frames_of(tmp_path / "b.mp4")
    sideways = turn in (90, 270)
    assert found.shape == ((128, 64, 3) if sideways else (64, 128, 3))
    assert found[corner].min() > 0.95
    others = {(0, 0), (0, -1), (-1, 0), (-1, -1)} - {corner}
    assert all(abs(found[other].mean() - 0.5) < 0.03 for other in others)
    result = open_clip(tmp_path / "b.mp4")
    assert result.turn == type(result.turn)() and result.aspect == (Fraction(3, 4) if sideways else Fraction(4, 3))


def test_interlaced_clips_are_noticed_and_deinterlaced(tmp_path):
    # A bar that moves between the two moments of each frame: combs.
    frames = []
    for index in range(6):
        frame = np.zeros((64, 64, 3), np.float32) + 0.1
        for field in (0, 1):
            start = 8 * index + 4 * field
            frame[field::2, start : start + 8] = 0.9
        frames.append(frame)

    source = make_clip(tmp_path / "a.mkv", frames, options={"x264-params": "tff=1"}, format="yuv420p")
    assert open_clip(source).interlaced
    enlarge(source, tmp_path / "combs.mkv", 1)
    enlarge(source, tmp_path / "b.mkv", 1, deinterlace=True)

    def combs(path):
        return np.mean([np.abs(np.diff(pixels[..., 0], axis=0)).mean() for _, pixels in frames_of(path)])

    assert [time for time, _ in frames_of(tmp_path / "b.mkv")] == [time for time, _ in frames_of(source)]
    assert combs(tmp_path / "b.mkv") < 0.5 * combs(tmp_path / "combs.mkv")
    assert not open_clip(tmp_path / "b.mkv").interlaced
