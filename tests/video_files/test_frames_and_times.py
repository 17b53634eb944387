"""Every frame, at its time, of the exact size, with the sound of the source, in every container."""

import io
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

av = pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")

from clips import audio_bytes, enlarge, flat, frames_of, make_clip, moving  # noqa: E402

from qartsr_pipeline.image_files import ImageFile, read_image, write_image  # noqa: E402
from qartsr_pipeline.video_files import VideoFileError  # noqa: E402
from qartsr_pipeline.video_files.reading import open_clip, read_frames  # noqa: E402

VARIABLE = [0, 1, 2, 5, 6, 7, 11, 12, 13, 20]


def assert_same_frames(source, target, factor=2, tolerance=0.02):
    before, after = frames_of(source), frames_of(target)
    assert len(after) == len(before)
    for (_, small), (_, large) in zip(before, after, strict=True):
        assert large.shape == (small.shape[0] * factor, small.shape[1] * factor, 3)
        assert np.abs(large - small.repeat(factor, 0).repeat(factor, 1)).mean() < tolerance


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mp4", "h264"), (".mp4", "hevc"), (".mov", None), (".mkv", "ffv1"), (".webm", "av1"), (".gif", None)]
)
def test_frames_and_variable_times_are_kept_in_every_container(tmp_path, suffix, codec):
    source = make_clip(tmp_path / "clip.mp4", moving(10), format="yuv420p", times=VARIABLE)
    target = tmp_path / f"big{suffix}"
    enlarge(source, target, codec=codec)
    assert_same_frames(source, target)
    times = [time for time, _ in frames_of(target)]
    assert times == [Fraction(time, 25) for time in VARIABLE]
    assert not target.with_name(target.name + ".parts").exists()


def test_the_last_frame_is_shown_as_long_as_before(tmp_path):
    source = make_clip(tmp_path / "clip.mp4", moving(5), times=[0, 1, 2, 3, 4])
    enlarge(source, tmp_path / "big.mp4")
    with av.open(str(source)) as before, av.open(str(tmp_path / "big.mp4")) as after:
        lengths = [c.streams.video[0].duration * c.streams.video[0].time_base for c in (before, after)]
        assert lengths[0] == lengths[1] == Fraction(1, 5)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "aac"), (".mkv", "pcm_s16le"), (".webm", "libopus")])
def test_sound_is_copied_bit_for_bit_and_stays_in_step(tmp_path, suffix, codec):
    video = {"codec": "libsvtav1", "format": "yuv420p"} if suffix == ".webm" else {}
    frames = [flat((0.5,) * 3, 64, 64)] * 12
    source = make_clip(tmp_path / f"clip{suffix}", frames, audio=codec, **video)
    enlarge(source, tmp_path / f"big{suffix}")
    before, after = audio_bytes(source), audio_bytes(tmp_path / f"big{suffix}")
    assert before and before == after
    assert [time for time, _ in frames_of(source)] == [time for time, _ in frames_of(tmp_path / f"big{suffix}")]


def test_sound_stays_in_step_where_the_container_has_no_times_before_zero(tmp_path):
    source = make_clip(tmp_path / "clip.mp4", moving(12), audio="aac")  # AAC begins 1024 samples before the first frame
    enlarge(source, tmp_path / "big.mkv")
    offsets = [audio_bytes(path)[0][0] - frames_of(path)[0][0] for path in (source, tmp_path / "big.mkv")]
    assert offsets[0] < 0 and abs(offsets[0] - offsets[1]) < Fraction(2, 1000)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_of_a_transport_stream_gets_the_form_of_the_new_file(tmp_path, suffix):
    source = make_clip(tmp_path / "clip.ts", moving(12), start=2, audio="aac", format="yuv420p", container_format="mpegts")
    assert enlarge(source, tmp_path / f"big{suffix}") == []
    with av.open(str(tmp_path / f"big{suffix}")) as container:
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1)
    assert sound.shape[1] > 20000 and np.abs(sound).max() > 0.3  # the click is heard


def test_zero_length_sound(tmp_path):
    source = make_clip(tmp_path / "clip.mkv", moving(6), audio="empty")
    enlarge(source, tmp_path / "big.mkv")
    assert_same_frames(source, tmp_path / "big.mkv")


def text_and_chapters(out):
    """Adds subtitles, chapters, a title and languages."""
    stream = out.add_mux_stream("subrip")
    stream.time_base = Fraction(1, 1000)
    stream.metadata["language"] = "deu"
    out.metadata["title"] = "A clip"
    out.set_chapters(
        [
            {"id": 1, "start": 0, "end": 120, "time_base": Fraction(1, 1000), "metadata": {"title": "One"}},
            {"id": 2, "start": 120, "end": 400, "time_base": Fraction(1, 1000), "metadata": {"title": "Two"}},
        ]
    )
    yield None
    packet = av.Packet("Grüße".encode())
    packet.stream, packet.time_base, packet.pts, packet.dts, packet.duration = stream, Fraction(1, 1000), 40, 40, 100
    yield packet


def subtitles(path):
    with av.open(str(path)) as container:
        stream = container.streams.subtitles[0]
        return stream.metadata["language"], [bytes(p).decode() for p in container.demux(stream) if p.size]


@pytest.fixture
def with_text(tmp_path):
    def packets(out):
        found = text_and_chapters(out)
        next(found)
        return found

    return make_clip(tmp_path / "clip.mkv", moving(10), packets=packets)


def test_subtitles_chapters_and_tags_are_kept(with_text, tmp_path):
    enlarge(with_text, tmp_path / "big.mkv")
    assert subtitles(tmp_path / "big.mkv") == subtitles(with_text) == ("deu", ["Grüße"])
    with av.open(str(tmp_path / "big.mkv")) as container:
        assert container.metadata["title"] == "A clip"
        assert [(c["start"] * c["time_base"], c["metadata"]["title"]) for c in container.chapters()] == [
            (0, "One"),
            (Fraction(3, 25), "Two"),
        ]


def with_cover(path, container):
    """A clip with a cover picture, two sounds in different languages and, in Matroska, a font."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    buffer.seek(0)
    with av.open(buffer) as image, av.open(str(path), "w", format=container) as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        sounds = [out.add_stream("aac", rate=48000) for _ in range(2)]
        for sound, language in zip(sounds, ("fra", "jpn"), strict=True):
            sound.metadata["language"] = language
        sounds[1].disposition = av.stream.Disposition.forced
        if container == "matroska":
            out.add_attachment("Font.ttf", "font/ttf", b"letters")
            out.add_attachment("cover.png", "image/png", buffer.getvalue())
        else:
            cover = out.add_stream_from_template(image.streams.video[0], opaque=True)
            cover.disposition = av.stream.Disposition.attached_pic
            picture = next(packet for packet in image.demux() if packet.size)
            picture.stream, picture.pts, picture.dts = cover, 0, 0
            out.mux(picture)
        for index in range(6):
            frame = av.VideoFrame(48, 32, "yuv420p")
            for plane in frame.planes:
                plane.update(bytes([90 + index]) * plane.buffer_size)
            frame.pts = index
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for sound in sounds:
            block = av.AudioFrame.from_ndarray(np.zeros((2, 12000), np.float32), format="fltp", layout="stereo")
            block.sample_rate, block.pts = 48000, 0
            out.mux(sound.encode(block))
            out.mux(sound.encode(None))
    return path


@pytest.mark.parametrize(("suffix", "container"), [(".mp4", "mp4"), (".mkv", "matroska")])
def test_covers_fonts_and_languages_are_kept(tmp_path, suffix, container):
    source = with_cover(tmp_path / f"clip{suffix}", container)
    assert enlarge(source, tmp_path / f"big{suffix}") == []
    found = []
    for path in (source, tmp_path / f"big{suffix}"):
        with av.open(str(path)) as opened:
            pictures = [s for s in opened.streams.video if s.disposition & av.stream.Disposition.attached_pic]
            sounds = [
                (s.metadata.get("language"), bool(s.disposition & av.stream.Disposition.forced)) for s in opened.streams.audio
            ]
            fonts = [(s.metadata["filename"], bytes(s.data)) for s in opened.streams.attachments]
            assert len(pictures) == 1 and len(sounds) == 2
            found.append((sounds, fonts, [bytes(p) for p in opened.demux(pictures[0]) if p.size]))
    assert found[0] == found[1]
    assert_same_frames(source, tmp_path / f"big{suffix}")


def test_what_a_container_cannot_hold_is_said(with_text, tmp_path):
    notices = enlarge(with_text, tmp_path / "big.mp4")
    assert any("subtitle (subrip, deu)" in notice and ".mkv" in notice for notice in notices)
    with av.open(str(tmp_path / "big.mp4")) as container:
        assert not container.streams.subtitles and len(container.chapters()) == 2


def test_the_times_of_a_transport_stream_begin_at_zero(tmp_path):
    source = make_clip(tmp_path / "clip.ts", moving(8), start=10, audio="mp2", format="yuv420p", container_format="mpegts")
    assert frames_of(source)[0][0] < 0.2
    enlarge(source, tmp_path / "big.mkv")
    with av.open(str(source)) as before, av.open(str(tmp_path / "big.mkv")) as after:
        starts = [[s.start_time * s.time_base for s in c.streams] for c in (before, after)]
    assert (
        starts[0][0] >= 10
        and starts[1][0] < 1
        and abs((starts[0][1] - starts[0][0]) - (starts[1][1] - starts[1][0])) < Fraction(3, 1000)
    )


@pytest.mark.parametrize("height, width, factor", [(16, 16, 4), (17, 23, 2), (17, 23, 3)])
def test_any_size_from_16_pixels_on(tmp_path, height, width, factor):
    source = make_clip(tmp_path / "clip.mkv", moving(3, height, width), codec="ffv1", format="yuv420p", options={})
    notices = enlarge(source, tmp_path / "big.mp4", factor)
    assert_same_frames(source, tmp_path / "big.mp4", factor)
    assert any("4:4:4" in notice for notice in notices) == (factor == 3)  # 51 x 69: H.264 has no odd numbers in 4:2:0


def test_one_frame(tmp_path):
    source = make_clip(tmp_path / "clip.mp4", moving(1))
    enlarge(source, tmp_path / "big.mp4")
    assert_same_frames(source, tmp_path / "big.mp4")


def test_image_sequences_in_and_out(tmp_path):
    frames = [(np.float32(frame) * 65535).round().astype(np.uint16) for frame in moving(3)]
    for index, pixels in enumerate(frames, 7):
        write_image(tmp_path / f"in_{index:03}.png", pixels / 65535, ImageFile(pixels))
    notices = enlarge(tmp_path / "in_%03d.png", tmp_path / "out" / "big_%04d.png")
    assert any("25 frames a second" in notice for notice in notices)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["big_0007.png", "big_0008.png", "big_0009.png"]
    for index, pixels in enumerate(frames, 7):
        assert (read_image(tmp_path / "out" / f"big_{index:04}.png").pixels == pixels.repeat(2, 0).repeat(2, 1)).all()
    assert enlarge(tmp_path / "in_%03d.png", tmp_path / "clip.mkv", fps=50, codec="ffv1") == []
    clip = open_clip(tmp_path / "clip.mkv")
    assert (
        clip.rate == 50 and clip.kind.depth == 16 and [f.time * clip.time_base for f in read_frames(clip)][-1] == Fraction(2, 50)
    )
    (tmp_path / "in_008.png").unlink()
    with pytest.raises(VideoFileError, match="must be above 0"):
        open_clip(tmp_path / "in_%03d.png", fps=0)
    with pytest.raises(VideoFileError, match="after number 7 follows 9"):
        open_clip(tmp_path / "in_%03d.png")


def test_an_image_sequence_of_two_sizes_is_refused(tmp_path):
    for index, side in enumerate((16, 18)):
        Image.new("RGB", (side, 16)).save(tmp_path / f"{index}.png")
    with pytest.raises(VideoFileError, match="18 x 16 pixels, but the images before it 16 x 16"):
        enlarge(tmp_path / "%d.png", tmp_path / "big.mp4", fps=25)


def test_places_of_an_avi_in_which_the_frame_before_stays_are_not_missing(tmp_path):
    options = {"codec": "mjpeg", "format": "yuvj420p", "options": {}}
    source = make_clip(tmp_path / "a.avi", moving(7), times=[0, 1, 2, 5, 6, 9, 10], **options)
    assert not any("cut off" in notice for notice in enlarge(source, tmp_path / "b.mkv"))
    assert [time for time, _ in frames_of(source)] == [time for time, _ in frames_of(tmp_path / "b.mkv")]
    whole = make_clip(tmp_path / "c.avi", moving(12), **options)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    assert any("lasts 0:00.5, but its last frame" in notice for notice in enlarge(whole, tmp_path / "d.mkv"))


def test_a_last_frame_that_stays_is_no_sign_of_a_damaged_clip(tmp_path):
    first = Image.new("RGB", (16, 16), "red")
    first.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")], duration=[100, 3000])
    assert not any("cut off" in notice for notice in enlarge(tmp_path / "a.gif", tmp_path / "b.mp4"))
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].duration * container.streams.video[0].time_base == Fraction(31, 10)


def test_gif_keeps_its_loops_and_transparency_is_laid_over_white(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([255, 0, 0, 0, 0, 200])
    image.paste(0, (0, 0, 8, 16))
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.transpose(0)], duration=[70, 200], loop=3, transparency=0)
    notices = enlarge(tmp_path / "a.gif", tmp_path / "b.gif")
    assert any("over white" in notice for notice in notices)
    with Image.open(tmp_path / "b.gif") as result:
        assert result.size == (32, 32) and result.n_frames == 2 and result.info["loop"] == 3 and result.info["duration"] == 70
        assert result.convert("RGB").getpixel((2, 2)) == (255, 255, 255) and result.convert("RGB").getpixel((30, 2)) == (
            0,
            0,
            200,
        )
        result.seek(1)
        assert result.info["duration"] == 200
