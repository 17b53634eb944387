"""Work that is interrupted, or that the disk ends: what was finished stays, and --resume goes on after it."""

import json
import signal

import numpy as np
import pytest

resource = pytest.importorskip("resource", reason="there are no limits of file sizes on Windows")
av = pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")

from clips import audio_bytes, frames_of, make_clip, moving  # noqa: E402
from PIL import Image  # noqa: E402

from qartsr_pipeline.video_files import VideoFileError, parts  # noqa: E402
from qartsr_pipeline.video_files.damage import Damage  # noqa: E402
from qartsr_pipeline.video_files.reading import open_clip, read_frames  # noqa: E402
from qartsr_pipeline.video_files.writing import open_writer  # noqa: E402

LOSSLESS = {"codec": "ffv1"}


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_FRAMES", 4)


@pytest.fixture
def clip(tmp_path):
    noise = np.random.default_rng(0).random((14, 32, 48, 3), dtype=np.float32)
    times = [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 20, 21]
    return make_clip(tmp_path / "clip.mkv", list(noise), codec="ffv1", options={}, times=times, audio="pcm_s16le")


def begin(clip, target, job=None, **options):
    opened = open_clip(clip)
    return opened, open_writer(opened, target, (64, 96), job=job, **options)[0]


def write(opened, writer, up_to=None):
    for frame in read_frames(opened, writer.done):
        if writer.done == up_to:
            return
        writer.write(frame.pixels.repeat(2, 0).repeat(2, 1), frame.time, frame.duration)


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("codec", ["ffv1", "h264", "hevc"])
def test_parts_are_joined_without_a_frame_lost_or_moved(clip, tmp_path, codec):
    opened, writer = begin(clip, tmp_path / "big.mkv", codec=codec)
    write(opened, writer)
    assert writer.finish() == []
    before, after = frames_of(clip), frames_of(tmp_path / "big.mkv")
    assert [time for time, _ in after] == [time for time, _ in before] and len(after) == 14
    for (_, small), (_, large) in zip(before, after, strict=True):
        assert np.abs(small - large[::2, ::2]).mean() < (0.01 if codec == "ffv1" else 0.1)
    assert audio_bytes(clip) == audio_bytes(tmp_path / "big.mkv")
    assert listing(tmp_path) == ["big.mkv", "clip.mkv"]


def test_an_interrupted_run_is_gone_on_with_and_gives_the_same(clip, tmp_path):
    opened, whole = begin(clip, tmp_path / "whole.mkv", **LOSSLESS)
    write(opened, whole)
    whole.finish()
    target = tmp_path / "big.mkv"
    opened, writer = begin(clip, target, **LOSSLESS)
    write(opened, writer, up_to=6)
    writer.suspend(keep=True)
    assert writer.done == 6 and not target.exists()
    assert listing(tmp_path / "big.mkv.parts") == ["00000000.json", "00000000.mkv", "00000004.json", "00000004.mkv", "job.json"]
    with pytest.raises(VideoFileError, match="holds 6 frames of an earlier run. Add --resume"):
        begin(clip, target, **LOSSLESS)
    opened, writer = begin(clip, target, **LOSSLESS, resume=True)
    assert writer.done == 6
    write(opened, writer)
    writer.finish()
    for (time, pixels), (expected, same) in zip(frames_of(target), frames_of(tmp_path / "whole.mkv"), strict=True):
        assert time == expected and (pixels == same).all()


def test_a_killed_run_keeps_its_finished_parts(clip, tmp_path):
    target = tmp_path / "big.mkv"
    opened, writer = begin(clip, target, **LOSSLESS)
    write(opened, writer, up_to=7)  # and nothing is said to it any more
    writer._lock.release()  # as the system does when a process ends
    (tmp_path / "big.mkv.parts" / "00000004.json").write_text("{", encoding="utf-8")  # as if killed before the table was written
    opened, writer = begin(clip, target, **LOSSLESS, resume=True)
    assert writer.done == 4
    write(opened, writer)
    writer.finish()
    assert len(frames_of(target)) == 14


def test_ctrl_c_while_a_frame_is_encoded_waits_for_it(clip, tmp_path, monkeypatch):
    write_frame = parts.PartWriter.write

    def interrupted(self, pixels):
        write_frame(self, pixels)
        if self._number == 6:
            signal.raise_signal(signal.SIGINT)

    opened, writer = begin(clip, tmp_path / "big.mkv", **LOSSLESS)
    with monkeypatch.context() as patch:
        patch.setattr(parts.PartWriter, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(opened, writer)
    writer.suspend(keep=True)
    assert writer.done == 6
    opened, writer = begin(clip, tmp_path / "big.mkv", **LOSSLESS, resume=True)
    write(opened, writer)
    writer.finish()
    assert [time for time, _ in frames_of(tmp_path / "big.mkv")] == [time for time, _ in frames_of(clip)]


def test_parts_of_slow_models_end_by_time(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_SECONDS", -1.0)
    opened, writer = begin(clip, tmp_path / "big.mkv", codec="h264")
    write(opened, writer)
    assert len(writer.parts) == 14
    writer.finish()
    assert [time for time, _ in frames_of(tmp_path / "big.mkv")] == [time for time, _ in frames_of(clip)]


def test_other_options_are_not_mixed(clip, tmp_path):
    target = tmp_path / "big.mkv"
    opened, writer = begin(clip, target, {"model": "a"}, **LOSSLESS)
    write(opened, writer, up_to=5)
    writer.suspend(keep=True)
    with pytest.raises(VideoFileError, match=r"with other options \(model\)"):
        begin(clip, target, {"model": "b"}, **LOSSLESS, resume=True)
    with pytest.raises(VideoFileError, match=r"\(fidelity\)"):
        begin(clip, target, {"model": "a", "model_options": {"fidelity": 0.5}}, **LOSSLESS, resume=True)
    with pytest.raises(VideoFileError, match=r"\(codec, "):
        begin(clip, target, {"model": "a"}, codec="h264", resume=True)
    _, writer = begin(clip, target, {"model": "b"}, **LOSSLESS, overwrite=True)
    assert writer.done == 0
    writer.suspend(keep=True)
    assert not (tmp_path / "big.mkv.parts").exists(), "nothing was finished, so nothing is left"


@pytest.fixture
def file_size_limit():
    """Sets the largest size of a file, which fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_while_frames_are_written(clip, tmp_path, file_size_limit, monkeypatch):
    target = tmp_path / "big.mkv"
    opened, writer = begin(clip, target, **LOSSLESS)
    write(opened, writer, up_to=4)
    monkeypatch.setattr(parts, "PART_FRAMES", 100)
    file_size_limit(2 * (tmp_path / "big.mkv.parts" / "00000000.mkv").stat().st_size)
    with pytest.raises(VideoFileError, match="disk is full") as error:
        write(opened, writer)
        writer.finish()
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert "Free some space" in str(error.value)
    writer.suspend(keep=True)
    assert writer.done == 4 and not target.exists()
    opened, writer = begin(clip, target, **LOSSLESS, resume=True)
    write(opened, writer)
    writer.finish()
    assert len(frames_of(target)) == 14


def test_a_full_disk_while_parts_are_joined(clip, tmp_path, file_size_limit):
    target = tmp_path / "big.mkv"
    target.write_text("an older file")
    opened, writer = begin(clip, target, **LOSSLESS, overwrite=True)
    write(opened, writer)
    file_size_limit(2 * (tmp_path / "big.mkv.parts" / "00000000.mkv").stat().st_size)
    with pytest.raises(VideoFileError, match="disk is full"):
        writer.finish()
    file_size_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    writer.suspend(keep=True)
    assert target.read_text() == "an older file"
    opened, writer = begin(clip, target, **LOSSLESS, resume=True)
    assert writer.done == 14
    writer.finish()
    assert len(frames_of(target)) == 14 and not (tmp_path / "big.mkv.parts").exists()


def test_a_folder_that_cannot_be_written(clip, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VideoFileError, match="cannot be written"):
        begin(clip, tmp_path / "file" / "big.mkv")


def test_what_the_work_was_is_written_down(clip, tmp_path):
    begin(clip, tmp_path / "big.mkv", {"model": "a"}, **LOSSLESS)
    job = json.loads((tmp_path / "big.mkv.parts" / "job.json").read_text())
    assert job["model"] == "a" and job["encoding"]["codec"] == "ffv1" and str(clip) in job["source"][0]


def test_numbered_images_are_gone_on_with(clip, tmp_path):
    opened = open_clip(clip)
    writer, _ = open_writer(opened, tmp_path / "out" / "%03d.png", (64, 96))
    write(opened, writer, up_to=5)
    writer.suspend(keep=True)
    with pytest.raises(VideoFileError, match="exists already. Add --resume"):
        open_writer(opened, tmp_path / "out" / "%03d.png", (64, 96))
    with pytest.raises(VideoFileError, match="005.png does not have the 48 x 32 pixels"):
        open_writer(opened, tmp_path / "out" / "%03d.png", (32, 48), resume=True)
    writer, _ = open_writer(opened, tmp_path / "out" / "%03d.png", (64, 96), resume=True)
    assert writer.done == 5
    write(opened, writer)
    assert listing(tmp_path / "out") == [f"{number:03}.png" for number in range(1, 15)] and writer.finish() == []
    (tmp_path / "out" / "020.png").write_bytes((tmp_path / "out" / "014.png").read_bytes())
    assert "holds 1 more images of this form, from 020.png on" in writer.finish()[0]


def test_numbered_images_are_gone_on_with_where_others_may_be_replaced(clip, tmp_path):
    opened, pattern = open_clip(clip), tmp_path / "out" / "%03d.png"
    write(opened, open_writer(opened, pattern, (64, 96))[0], up_to=5)
    assert open_writer(opened, pattern, (64, 96), overwrite=True)[0].done == 0
    assert open_writer(opened, pattern, (64, 96), resume=True, overwrite=True)[0].done == 5


def test_a_frame_that_was_only_begun_spoils_no_finished_part(clip, tmp_path):
    """The disk fills up while a packet is written, and has room again when the part is closed."""
    opened, writer = begin(clip, tmp_path / "big.mkv", **LOSSLESS)
    write(opened, writer, up_to=6)

    class Full:
        def __getattr__(self, name):
            return getattr(container, name)

        def mux(self, packet):
            raise OSError(28, "No space left on device")

    container = writer._writer._container
    writer._writer._container = Full()
    with pytest.raises(VideoFileError, match="disk is full"):
        write(opened, writer)
    writer._writer._container = container
    writer.suspend(keep=True)
    assert writer.done == 4
    opened, writer = begin(clip, tmp_path / "big.mkv", **LOSSLESS, resume=True)
    write(opened, writer)
    writer.finish()
    assert len(frames_of(tmp_path / "big.mkv")) == 14


def test_numbered_images_of_another_size_are_not_gone_on_with(clip, tmp_path):
    opened, pattern = open_clip(clip), tmp_path / "out" / "%03d.png"
    write(opened, open_writer(opened, pattern, (64, 96))[0], up_to=2)
    with pytest.raises(VideoFileError, match="002.png does not have the 144 x 96 pixels"):
        open_writer(opened, pattern, (96, 144), resume=True)
    assert open_writer(opened, tmp_path / "out" / "%d.png", (64, 96), resume=True)[0].done == 0  # other names


def test_numbered_images_that_are_all_done_are_no_damage(tmp_path):
    for number in (1, 2):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    opened, damage = open_clip(tmp_path / "%d.png"), Damage()
    assert list(read_frames(opened, 2, damage=damage)) == [] and damage.notices(opened) == []
    assert next(read_frames(opened)).pixels.flags.writeable


def test_numbered_images_never_replace_those_that_are_read(tmp_path):
    for number in (9, 10):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    before = [(tmp_path / name).read_bytes() for name in ("9.png", "10.png")]
    opened = open_clip(tmp_path / "%d.png")
    for pattern in ("%1d.png", "%02d.png"):  # all, and only the second
        with pytest.raises(VideoFileError, match="one of the input's images, which would be lost"):
            open_writer(opened, tmp_path / pattern, (64, 64), overwrite=True)
    assert [(tmp_path / name).read_bytes() for name in ("9.png", "10.png")] == before


def test_a_result_that_cannot_be_replaced_is_refused_before_the_work(clip, tmp_path):
    (tmp_path / "folder.mkv").mkdir()
    (tmp_path / "protected.mkv").write_bytes(b"an earlier result")
    (tmp_path / "protected.mkv").chmod(0o444)
    for name, reason in (("folder.mkv", "That is a folder"), ("protected.mkv", "write-protected")):
        with pytest.raises(VideoFileError, match=reason):
            begin(clip, tmp_path / name, overwrite=True)
        assert not (tmp_path / f"{name}.parts").exists()


def test_nothing_is_deleted_of_parts_that_are_not_gone_on_with(clip, tmp_path):
    opened, writer = begin(clip, tmp_path / "big.mkv", **LOSSLESS)
    write(opened, writer, up_to=13)
    writer._lock.release()  # as the system does when a process ends
    (tmp_path / "big.mkv.parts" / "00000004.json").unlink()  # a gap
    before = listing(tmp_path / "big.mkv.parts")
    for refused in ({}, {"resume": True, "job": {"model": "another"}}):
        with pytest.raises(VideoFileError):
            begin(clip, tmp_path / "big.mkv", **LOSSLESS, **refused)
        assert listing(tmp_path / "big.mkv.parts") == before
    assert begin(clip, tmp_path / "big.mkv", **LOSSLESS, resume=True)[1].done == 4


def test_memory_does_not_grow_with_the_clip(tmp_path):
    long = make_clip(tmp_path / "long.mkv", moving(16, 16, 16) * 20, codec="ffv1", options={})
    opened = open_clip(long)
    reading = read_frames(opened)
    alive = [frame.pixels for _, frame in zip(range(3), reading, strict=False)]
    assert len(alive) == 3  # frames come one by one: nothing is read ahead
    assert sum(1 for _ in reading) == 317


def test_two_runs_of_one_clip_do_not_mix(clip, tmp_path):
    target = tmp_path / "big.mkv"
    opened, writer = begin(clip, target, **LOSSLESS)
    write(opened, writer, up_to=6)
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(VideoFileError, match="big.mkv.parts is in use by process"):
            begin(clip, target, **LOSSLESS, **options)
    write(opened, writer)
    writer.finish()
    assert len(frames_of(target)) == 14 and listing(tmp_path) == ["big.mkv", "clip.mkv"]


def test_what_appears_meanwhile_is_left_alone(clip, tmp_path):
    target = tmp_path / "big.mkv"
    opened, writer = begin(clip, target, **LOSSLESS)
    write(opened, writer)
    target.write_text("somebody else's")
    with pytest.raises(VideoFileError, match="has appeared while this ran.*--resume --overwrite"):
        writer.finish()
    writer.suspend(keep=True)
    assert target.read_text() == "somebody else's"
    opened, writer = begin(clip, target, **LOSSLESS, resume=True, overwrite=True)
    assert writer.done == 14
    writer.finish()
    assert len(frames_of(target)) == 14
    opened, writer = begin(clip, tmp_path / "images" / "%d.png")
    write(opened, writer, up_to=2)
    (tmp_path / "images" / "3.png").write_text("somebody else's")
    with pytest.raises(VideoFileError, match="3.png has appeared while this ran"):
        write(opened, writer)
    assert (tmp_path / "images" / "3.png").read_text() == "somebody else's"
