"""Files that cannot be read as a clip, or only in part: each is refused or read up to there, with a message that says why."""

import shutil
import sys

import numpy as np
import pytest

av = pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")

from clips import enlarge, frames_of, make_clip, moving  # noqa: E402
from PIL import Image  # noqa: E402

from qartsr_pipeline.video_files import VideoFileError, import_av  # noqa: E402
from qartsr_pipeline.video_files.reading import open_clip  # noqa: E402


@pytest.fixture
def clip(tmp_path):
    noise = np.random.default_rng(0).random((20, 32, 48, 3), dtype=np.float32)
    return make_clip(tmp_path / "clip.mp4", list(noise), audio="aac")


def refusal(path, **options):
    with pytest.raises(VideoFileError) as error:
        open_clip(path, **options)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and path.name in message
    return message


def test_a_file_that_is_no_video(tmp_path):
    text = tmp_path / "clip.mp4"
    text.write_text("This is no clip. " * 100)
    assert "is no video, or its beginning or index is missing" in refusal(text)
    (tmp_path / "empty.mkv").touch()
    assert "is empty" in refusal(tmp_path / "empty.mkv")
    assert "There is no file" in refusal(tmp_path / "missing.mkv")
    (tmp_path / "folder.mkv").mkdir()
    assert "%05d.png" in refusal(tmp_path / "folder.mkv")


def test_sound_without_frames(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=48000)
        block = av.AudioFrame.from_ndarray(np.zeros((1, 9600), np.int16), format="s16", layout="stereo")
        block.sample_rate, block.pts = 48000, 0
        out.mux(stream.encode(block))
    assert "holds no video, only audio" in refusal(tmp_path / "a.mkv")


def test_no_frames(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        stream = out.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.start_encoding()
    assert "no frames" in refusal(tmp_path / "a.mkv") or "no video" in refusal(tmp_path / "a.mkv")
    assert "There is no image file" in refusal(tmp_path / "%03d.png")


def test_a_clip_whose_index_is_cut_off(clip):
    clip.write_bytes(clip.read_bytes()[:-200])  # the index comes last
    assert "beginning or index is missing" in refusal(clip)


@pytest.mark.parametrize("suffix", [".mkv", ".ts"])
def test_a_clip_that_ends_in_the_middle_of_a_packet(tmp_path, suffix):
    noise = np.random.default_rng(0).random((20, 32, 48, 3), dtype=np.float32)
    source = make_clip(tmp_path / f"clip{suffix}", list(noise), format="yuv420p", options={"g": "1", "bf": "0"})
    whole = frames_of(source)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    notices = enlarge(source, tmp_path / "big.mp4")
    found = frames_of(tmp_path / "big.mp4")
    assert 8 <= len(found) < 16
    for (_, before), (_, after) in zip(whole[: len(found) - 1], found, strict=False):
        assert np.abs(before - after[::2, ::2]).mean() < 0.1
    assert any("damaged place" in notice or "breaks off" in notice or "cut off" in notice for notice in notices), notices


def test_a_clip_with_its_index_in_front_that_is_cut_off(clip, tmp_path):
    front = tmp_path / "front.mp4"
    with av.open(str(clip)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    front.write_bytes(front.read_bytes()[: front.stat().st_size * 6 // 10])
    notices = enlarge(front, tmp_path / "big.mp4")
    assert 6 <= len(frames_of(tmp_path / "big.mp4")) < 20
    assert any("damaged place" in notice or "20 frames" in notice for notice in notices), notices


def test_frames_of_different_sizes(tmp_path):
    first = make_clip(tmp_path / "a.ts", moving(4), format="yuv420p", container_format="mpegts")
    second = make_clip(tmp_path / "b.ts", moving(4, 48, 64), format="yuv420p", container_format="mpegts", start=1)
    with open(first, "ab") as out, open(second, "rb") as more:
        shutil.copyfileobj(more, out)
    with pytest.raises(VideoFileError, match="changes from 48 x 32 to 64 x 48 pixels at frame 4"):
        enlarge(first, tmp_path / "big.mkv")


def test_floating_point_frames_and_unknown_matrices_are_refused(tmp_path):
    odd = make_clip(tmp_path / "a.mkv", moving(1), codec="ffv1", options={}, tags=(8, 1, 1))  # YCgCo
    assert "matrix 8 of ITU-T H.273" in refusal(odd)


def test_a_video_codec_that_cannot_be_decoded_is_named(clip):
    data = clip.read_bytes()
    clip.write_bytes(data.replace(b"avc1", b"zzzz"))
    assert "does not decode" in refusal(clip) or "no frames" in refusal(clip)


def test_a_container_that_cannot_hold_the_codec(clip, tmp_path):
    for name, codec, crf, said in (
        ("b.webm", "h264", None, "hold h264"),
        ("b.mov", "ffv1", None, r"Write .mkv"),
        ("b.avi", None, None, "formats? that clips are written in"),
        ("b.mp4", "h264", 99, "0 .best. to 51"),
        ("b.mkv", "ffv1", 5, "lossless"),
        ("b.gif", None, 5, "GIF has no codecs"),
        ("b_%d.png", "h264", None, "no codec"),
    ):
        with pytest.raises(VideoFileError, match=said):
            enlarge(clip, tmp_path / name, codec=codec, crf=crf)
    with pytest.raises(VideoFileError, match="Leave out --fps"):
        open_clip(clip, fps=25)


def test_without_pyav_the_message_names_the_command(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoFileError, match=r"pip install 'qartsr\[video\]'"):
        import_av()


def test_a_cover_picture_is_no_clip(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "cover.png")
    path = make_clip(tmp_path / "a.mkv", moving(3))
    enlarge(path, tmp_path / "b.mp4")
    assert len(frames_of(tmp_path / "b.mp4")) == 3
