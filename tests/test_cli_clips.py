"""`qartsr upscale` with clips: image models frame by frame, video models as a whole, and what is said."""

import sys
from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")

sys.path.insert(0, str(Path(__file__).parent / "video_files"))
from clips import audio_bytes, frames_of, make_clip, moving  # noqa: E402
from PIL import Image  # noqa: E402

from qartsr_pipeline.cli import upscale_clips  # noqa: E402
from qartsr_pipeline.cli.main import main  # noqa: E402
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline  # noqa: E402
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline  # noqa: E402
from tiny_models import build_tiny_pipeline, build_tiny_video_pipeline  # noqa: E402


@pytest.fixture
def upscale(tiny_folder):
    return lambda *arguments: main(["upscale", "--model", str(tiny_folder), *map(str, arguments)])


@pytest.fixture
def upscale_whole(tmp_path):
    """With a video model."""
    build_tiny_video_pipeline().save_pretrained(tmp_path / "video-model")
    return lambda *arguments: main(["upscale", "--model", str(tmp_path / "video-model"), *map(str, arguments)])


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path / "clip.mp4", moving(7, 16, 16), times=[0, 1, 2, 5, 6, 9, 10], audio="aac", format="yuv420p")


@pytest.fixture
def without_network(monkeypatch):
    """Pixels are repeated, where the test is about something else than the model."""

    def repeated(self, frames, *, upscale):
        yield from (frame.repeat(4, 0).repeat(4, 1) for frame in frames)

    monkeypatch.setattr(upscale_clips.FrameByFrame, "stream", repeated)


def assert_enlarged(source, target, factor=4):
    before, after = frames_of(source), frames_of(target)
    assert [time for time, _ in before] == [time for time, _ in after]
    assert {pixels.shape for _, pixels in after} == {(before[0][1].shape[0] * factor, before[0][1].shape[1] * factor, 3)}
    assert audio_bytes(source) == audio_bytes(target)


def test_a_clip_frame_by_frame(upscale, clip, tmp_path, capsys, tiny_pipeline):
    assert upscale(clip) == 0
    target = tmp_path / "clip_x4.mp4"
    assert_enlarged(clip, target)
    said = capsys.readouterr().out
    assert "a model for images: frames are enlarged one by one" in said and "7 frames" in said and "frames/s" in said
    expected = tiny_pipeline(frames_of(clip)[3][1], output_type="np").images[0]
    assert np.abs(frames_of(target)[3][1] - expected).mean() < 0.02
    assert upscale(clip) == 2 and "exists already. Add --overwrite" in capsys.readouterr().err
    assert upscale(clip, "--overwrite", "--codec", "hevc", "--crf", "4", "--fidelity", "1") == 0
    from_input = tiny_pipeline(frames_of(clip)[3][1], output_type="np", fidelity=1.0).images[0]
    assert np.abs(frames_of(target)[3][1] - from_input).mean() < 0.02


def test_arguments_of_a_video_model_are_checked_before_the_first_clip(upscale_whole, clip, tmp_path, capsys):
    for option, value, said in (
        ("--upscale", "nan", "`upscale` must be above 0"),
        ("--frames-per-chunk", 0, "`frames_per_chunk` must be at least 1"),
        ("--chunk-overlap", 4, "`chunk_overlap` must be at most half"),
        ("--tile-size", 10, "`tile_size` must be at least 64"),
    ):
        assert upscale_whole(clip, "-o", tmp_path / "big.mkv", option, value) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "big.mkv.parts").exists()


@pytest.mark.parametrize("chunk", [None, 100])  # longer than the clip
def test_a_clip_with_a_video_model(upscale_whole, clip, tmp_path, capsys, chunk):
    options = [] if chunk is None else ["--frames-per-chunk", chunk]
    assert upscale_whole(clip, "-o", tmp_path / "big.mkv", "--codec", "ffv1", *options) == 0, capsys.readouterr().err
    before, after = frames_of(clip), frames_of(tmp_path / "big.mkv")
    assert len(after) == 7 and after[0][1].shape == (64, 64, 3)
    assert "one by one" not in capsys.readouterr().out
    pixels = [pixels for _, pixels in before]
    expected = list(build_tiny_video_pipeline().stream(pixels, frames_per_chunk=chunk))
    luma = np.float32([0.2126, 0.7152, 0.0722])  # chroma has fewer samples in the file than this model's noise
    assert max(np.abs((found - same) @ luma).mean() for (_, found), same in zip(after, expected, strict=True)) < 0.01


def test_ctrl_c_keeps_the_frames_and_resume_goes_on(upscale, clip, tmp_path, capsys, monkeypatch):
    calls, call = [], QArtSRPipeline.__call__

    def interrupted(self, *arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return call(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QArtSRPipeline, "__call__", interrupted)
        assert upscale(clip) == 130
    target = tmp_path / "clip_x4.mp4"
    assert "first 3 frames are kept. Add --resume" in capsys.readouterr().err and not target.exists()
    assert upscale(clip) == 2 and "--resume" in capsys.readouterr().err
    assert upscale(clip, "--resume", "--upscale", "2", "-o", target) == 2 and "(height, upscale, wid" in capsys.readouterr().err
    calls.clear()
    monkeypatch.setattr(QArtSRPipeline, "__call__", lambda *a, **k: calls.append(1) or call(*a, **k))
    assert upscale(clip, "--resume") == 0 and len(calls) == 4
    assert "already there: 3 frames" in capsys.readouterr().out
    assert_enlarged(clip, target)


def test_a_video_model_sees_frames_before_the_place_it_goes_on_from(upscale_whole, clip, tmp_path, monkeypatch, capsys):
    stream, seen = LSGQuantVideoPipeline.stream, []

    def stopped(self, frames, **options):
        for index, result in enumerate(stream(self, frames, **options)):
            if index == 6:
                raise RuntimeError("stopped")
            yield result

    def counted(self, frames, **options):
        return stream(self, (seen.append(1) or frame for frame in frames), **options)

    with monkeypatch.context() as patch:
        patch.setattr(LSGQuantVideoPipeline, "stream", stopped)
        assert upscale_whole(clip) == 2
    monkeypatch.setattr(LSGQuantVideoPipeline, "stream", counted)
    assert upscale_whole(clip, "--resume") == 0, capsys.readouterr().err
    assert len(seen) == 6  # frames 1 to 6: five before the place, and the last
    assert_enlarged(clip, tmp_path / "clip_x4.mp4")


def test_kinds_of_models_and_files_that_do_not_fit(upscale, upscale_whole, clip, tmp_path, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    for run, arguments, said in (
        (upscale_whole, [tmp_path / "photo.png"], "is a model for clips, but"),
        (upscale, [clip, tmp_path / "photo.png"], "one after the other"),
        (upscale, [tmp_path / "photo.png", "--crf", "3"], "--crf is for clips"),
        (upscale, [tmp_path / "photo.png", "--crf", "0"], "--crf is for clips"),
        (upscale, [tmp_path / "photo.png", "--fps", "0"], "--fps is for clips"),
        (upscale, [tmp_path / "photo.png", "-o", tmp_path / "a.mp4"], "frames/%05d.png"),
        (upscale, [clip, "--quality", "3"], "--quality is for images"),
        (upscale, [clip, "-o", tmp_path / "a.png"], "is one image, but"),
        (upscale, [clip, "-o", tmp_path / "a.avi"], "formats? that clips are written in"),
        (upscale, [clip, "-o", clip], "one of the inputs"),
        (upscale, [clip, "--color-fix", "adain"], "flickers"),
        (upscale, [clip, "--frames-per-chunk", "8"], "for video models"),
        (upscale_whole, [clip, "--color-fix", "wavelet"], "for image models"),
        (upscale_whole, [clip, "--tile-overlap", "8"], "for image models"),
        (upscale_whole, [clip, "--fidelity", "0.5"], "--fidelity is for image models"),
        (upscale, [tmp_path / "missing.mp4"], "There is no file"),
    ):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert said.replace("formats? ", "format ") in error and error.count("\n") == 1, error


def test_without_pyav_nothing_is_loaded(upscale, clip, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr(QArtSRPipeline, "from_pretrained", None)
    assert upscale(clip) == 2 and "pip install 'qartsr[video]'" in capsys.readouterr().err


def test_a_clip_that_cannot_be_read_is_said_before_a_model_is_loaded(upscale, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(QArtSRPipeline, "from_pretrained", None)
    (tmp_path / "notes.mp4").write_text("This is no clip. " * 100, encoding="utf-8")
    assert upscale(tmp_path / "notes.mp4") == 2 and "notes.mp4 is no video" in capsys.readouterr().err


def test_numbers_that_are_missing_are_said_before_a_model_is_loaded(upscale, tmp_path, capsys, monkeypatch):
    for number in (1, 2, 4):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(QArtSRPipeline, "from_pretrained", None)
    for pattern, said in (("%d.png", "after number 2 follows 4"), ("no_%d.png", "no image file of the form")):
        assert upscale(tmp_path / pattern, "-o", tmp_path / "a.mp4") == 2 and said in capsys.readouterr().err


def test_clips_in_a_folder_of_images_are_mentioned(upscale, without_network, clip, tmp_path, capsys):
    assert upscale(tmp_path) == 2 and f"qartsr upscale '{tmp_path}/*.mp4'" in capsys.readouterr().err
    Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
    assert upscale(tmp_path) == 0
    assert f"Clips are enlarged in a command of their own: qartsr upscale '{tmp_path}/*.mp4'" in capsys.readouterr().out


def test_frames_of_two_models_are_not_mixed(upscale, clip, tmp_path, capsys, monkeypatch, tiny_folder):
    call, calls = QArtSRPipeline.__call__, []

    def interrupted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(QArtSRPipeline, "__call__", interrupted)
        assert upscale(clip) == 130 and "the first frame is kept" in capsys.readouterr().err
    assert upscale(clip, "--resume", "--dtype", "float16") == 2 and "other options (dtype)" in capsys.readouterr().err
    build_tiny_pipeline(seed=1).save_pretrained(tiny_folder)  # other weights under the same name
    assert upscale(clip, "--resume") == 2 and "other options (model)" in capsys.readouterr().err


def test_several_clips_into_a_folder(upscale, without_network, clip, tmp_path, capsys):
    second = make_clip(tmp_path / "second.avi", moving(2, 16, 16), codec="mpeg4", format="yuv420p", options={})
    (tmp_path / "broken.mp4").write_bytes(b"no clip")
    arguments = (clip, second, tmp_path / "broken.mp4", "-o", tmp_path / "out")
    assert upscale(*arguments) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip_x4.mp4", "second_x4.mkv"]
    assert "3 clips: 2 written, 1 failed" in capsys.readouterr().out
    assert upscale(*arguments) == 2 and "3 clips: 0 written, 2 skipped, 1 failed" in capsys.readouterr().out


def test_an_animation_becomes_one_if_asked(upscale, tmp_path, capsys):
    image = Image.new("RGB", (16, 16), "red")
    image.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), "blue")], duration=100)
    assert upscale(tmp_path / "a.gif", "-o", tmp_path / "b.gif") == 0
    with Image.open(tmp_path / "b.gif") as result:
        assert result.n_frames == 2 and result.size == (64, 64)
    assert upscale(tmp_path / "a.gif") == 0 and (tmp_path / "a_x4.png").exists()  # the first frame, as ever


def test_interlaced_and_hdr_clips_are_said(upscale, without_network, tmp_path, capsys):
    source = make_clip(tmp_path / "a.mkv", moving(2, 32, 32), options={"x264-params": "tff=1"}, format="yuv420p")
    assert upscale(source) == 0 and "is interlaced" in capsys.readouterr().out
    assert upscale(source, "--overwrite", "--deinterlace") == 0 and "is interlaced" not in capsys.readouterr().out
    hdr = make_clip(tmp_path / "b.mkv", moving(1, 32, 32), codec="ffv1", options={}, format="yuv420p10le", tags=(9, 9, 18))
    assert upscale(hdr) == 0 and "is in HDR, and stays so" in capsys.readouterr().out


def test_results_that_are_no_numbers_are_never_written(upscale, clip, tmp_path, capsys, monkeypatch):
    def broken(self, frame, **options):
        return ([np.full((frame.shape[0] * 4, frame.shape[1] * 4, 3), np.nan, np.float32)],)

    monkeypatch.setattr(QArtSRPipeline, "__call__", broken)
    assert upscale(clip) == 2 and "NaN" in capsys.readouterr().err
    assert not (tmp_path / "clip_x4.mp4").exists() and not (tmp_path / "clip_x4.mp4.parts").exists()


def test_a_model_that_loses_frames_is_noticed(upscale, without_network, clip, tmp_path, capsys, monkeypatch):
    def lossy(self, frames, *, upscale):
        yield from list(self._all(frames, upscale=upscale))[:-1]

    monkeypatch.setattr(upscale_clips.FrameByFrame, "_all", upscale_clips.FrameByFrame.stream, raising=False)
    monkeypatch.setattr(upscale_clips.FrameByFrame, "stream", lossy)
    assert upscale(clip) == 2 and "1 frame fewer" in capsys.readouterr().err and not (tmp_path / "clip_x4.mp4").exists()


def test_progress_without_a_terminal(upscale, without_network, clip, capsys, monkeypatch):
    monkeypatch.setattr(upscale_clips, "_SAID_EVERY", 0.0)
    assert upscale(clip) == 0
    assert "clip.mp4: 3 of 7, " in (said := capsys.readouterr().out) and "frames/s" in said and "left" in said
