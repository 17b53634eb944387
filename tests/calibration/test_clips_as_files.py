"""Video files as clips to calibrate and to measure on: scenes, parts of long files, what the record says, what is refused."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "video_files"))

from clips import frames_of, make_clip, moving  # noqa: E402
from PIL import Image  # noqa: E402

from qartsr_pipeline import quantize  # noqa: E402
from qartsr_pipeline.calibration.data import clips as source  # noqa: E402
from qartsr_pipeline.calibration.data.clips import clips_to_calibrate_on  # noqa: E402
from qartsr_pipeline.calibration.recipe import Recipe  # noqa: E402
from qartsr_pipeline.calibration.recipe_layers import Layer  # noqa: E402
from qartsr_pipeline.cli.main import main  # noqa: E402
from qartsr_pipeline.video_files import VideoFileError  # noqa: E402
from tiny_models import build_tiny_pipeline, build_tiny_video_pipeline  # noqa: E402

RECIPE = Recipe(method="test", source="none", layer=Layer(activations="token", branch_rank=2), images=5, image_size=64)


def test_images_of_a_clip_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("f10.png", "f9.png", "f2 b1.png", "f2 a1.png", "g.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    (found,) = source.clip_files(tmp_path).values()
    assert [path.name for path in found] == ["f2 a1.png", "f2 b1.png", "f9.png", "f10.png", "g.png"]


@pytest.fixture
def folder(tmp_path):
    """Two files, one of which has a cut, and a clip as a folder of images."""
    folder = tmp_path / "clips"
    (folder / "images").mkdir(parents=True)
    make_clip(folder / "one.mp4", moving(6, 64, 72), format="yuv420p", audio="aac")
    cut = [*moving(5, 64, 72), *(1 - frame for frame in moving(7, 64, 72))]
    make_clip(folder / "two.mkv", cut, codec="ffv1", format="yuv444p10le", options={})
    for number, frame in enumerate(moving(5, 64, 64)):
        Image.fromarray((frame * 255).round().astype(np.uint8)).save(folder / "images" / f"{number}.png")
    return folder


def test_scenes_of_files_and_folders_of_images_are_clips(folder):
    told = []
    clips, record = clips_to_calibrate_on(folder, lambda *told_now: told.append(told_now))
    assert [clip.shape for clip in clips] == [(5, 64, 64, 3), (6, 64, 72, 3), (5, 64, 72, 3), (7, 64, 72, 3)]
    stored = [(pixels * 255).round() for _, pixels in frames_of(folder / "two.mkv")]
    assert np.array_equal(np.concatenate(clips[2:]), np.stack(stored))
    assert told[0] == ("read clips", 0, 23) and told[-1] == ("read clips", 23, 23) and told == sorted(told)
    assert (record["clips"], record["video_files"], record["frames"], record["count"]) == (4, 2, 23, 7)
    assert record["files"]["two.mkv"] == hashlib.sha256((folder / "two.mkv").read_bytes()).hexdigest()
    assert "too_short" not in record


def test_rows_of_a_long_file_are_taken_at_evenly_spaced_times(tmp_path, monkeypatch):
    brightness = np.linspace(0.2, 0.8, 60)
    make_clip(tmp_path / "long.mkv", [np.full((32, 48, 3), value) for value in brightness], codec="ffv1", options={})
    monkeypatch.setattr(source, "HELD", 3 * source.ROW * 32 * 48 * 3)
    clips, record = clips_to_calibrate_on(tmp_path / "long.mkv")
    assert [len(clip) for clip in clips] == [12, 12, 12] and record["frames"] == 36
    for clip, start in zip(clips, (4, 24, 44), strict=True):
        assert np.abs(clip.mean((1, 2, 3)) / 255 - brightness[start : start + 12]).max() < 0.01


def test_a_file_by_command_with_its_fingerprint_in_the_record(folder, tmp_path, capsys):
    build_tiny_video_pipeline().save_pretrained(tmp_path / "tiny-video")
    (tmp_path / "small.yaml").write_text(json.dumps(RECIPE.to_dict()), encoding="utf-8")
    command = ["quantize", tmp_path / "tiny-video", "--recipe", tmp_path / "small.yaml", "--device", "cpu"]
    run = [*command, "--data", folder / "two.mkv", "--evaluate", folder / "one.mp4", "--output", tmp_path / "run"]
    assert main([str(part) for part in run]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "model" / "quantization.json").read_text(encoding="utf-8"))
    assert record["data"]["files"] == {"two.mkv": hashlib.sha256((folder / "two.mkv").read_bytes()).hexdigest()}
    assert "one.mp4: frames of each version" in (tmp_path / "run" / "report" / "index.html").read_text(encoding="utf-8")
    capsys.readouterr()
    run = [*command, "--data", folder, "--evaluate", folder / "one.mp4", "--output", tmp_path / "again"]
    assert main([str(part) for part in run]) == 2
    assert "one.mp4 is among the files to calibrate on" in capsys.readouterr().err


def test_files_are_taken_in_a_list_as_the_pipeline_takes_them(folder):
    result = quantize(
        build_tiny_video_pipeline(),
        data=[folder / "one.mp4", str(folder / "images")],
        evaluation_data=[np.stack(moving(5, 32, 32))],
        recipe=RECIPE,
    )
    assert result.record["data"]["clips"] == 2 and result.record["data"]["count"] == 11
    assert len(result.rows) == 3


def test_what_is_no_clip_to_calibrate_on_is_said_before_anything_is_trained(folder, tmp_path, monkeypatch):
    pipeline, alone = build_tiny_video_pipeline(), tmp_path / "alone"
    alone.mkdir()

    def refused(said, error=ValueError, data=alone, model=pipeline):
        with pytest.raises(error, match=said):
            quantize(model, data=data, recipe=RECIPE)

    refused("neither an image nor a video file was found below", FileNotFoundError)
    refused("gone.mp4 does not exist", FileNotFoundError, tmp_path / "gone.mp4")
    (tmp_path / "notes.txt").write_text("no clip", encoding="utf-8")
    refused("notes.txt is no video file", FileNotFoundError, tmp_path / "notes.txt")
    make_clip(alone / "short.mp4", moving(3, 64, 72))
    refused("the longest clip has 3 frames, and a cut begins a new one: give clips of at least 5")
    assert clips_to_calibrate_on(alone)[1]["too_short"] == ["short.mp4"]
    make_clip(alone / "small.mp4", moving(6, 32, 48))
    refused("no clip is at least 64 pixels high and wide, the largest has 48 x 32")
    make_clip(alone / "hdr.mkv", moving(5, 64, 72), codec="ffv1", format="yuv420p10le", tags=(9, 9, 16), options={})
    refused("hdr.mkv is in HDR, but only clips that are not are taken here", VideoFileError)
    (alone / "hdr.mkv").write_text("This is no clip. " * 100, encoding="utf-8")
    refused("hdr.mkv is no video", VideoFileError)
    refused("holds clips, and the model is one for images", FileNotFoundError, folder / "one.mp4", build_tiny_pipeline())
    monkeypatch.setitem(sys.modules, "av", None)
    refused(r"pip install 'qartsr\[video\]' installs it", VideoFileError, folder)


def test_a_damaged_file_is_refused_and_one_that_ends_early_is_used_up_to_there(tmp_path):
    noise = np.random.default_rng(0).random((20, 32, 48, 3), dtype=np.float32)
    path = make_clip(tmp_path / "clip.mkv", list(noise), format="yuv420p", options={"g": "1", "bf": "0"})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 6 // 10])
    assert 8 <= clips_to_calibrate_on(path)[1]["frames"] < 16
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(3000) + whole[middle + 3000 :])
    with pytest.raises(VideoFileError, match=r"clip.mkv is damaged: only \d+ frames were read as they are"):
        clips_to_calibrate_on(path)
