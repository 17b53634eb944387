"""Models measured on clips."""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "video_files"))
from clips import make_clip, moving  # noqa: E402

from qartsr_pipeline.calibration.data.clips import clip_files, read_clip  # noqa: E402
from qartsr_pipeline.calibration.evaluation import clips as evaluation  # noqa: E402
from qartsr_pipeline.calibration.evaluation import evaluate, evaluate_clips  # noqa: E402
from qartsr_pipeline.calibration.evaluation.peers import lanczos  # noqa: E402
from qartsr_pipeline.calibration.evaluation.rows import markdown  # noqa: E402
from qartsr_pipeline.cli.main import main  # noqa: E402
from qartsr_pipeline.video_files.clip import VideoFileError  # noqa: E402
from tiny_models import build_tiny_pipeline, build_tiny_video_pipeline  # noqa: E402


@pytest.fixture
def clips(tmp_path):
    """Two folders of three images each, 38 x 33 pixels."""
    folder = tmp_path / "clips"
    for seed, name in enumerate(("one", "two")):
        (folder / name).mkdir(parents=True)
        base = np.random.default_rng(seed).integers(0, 256, (33, 44, 3), dtype=np.uint8)
        for frame in range(3):
            Image.fromarray(base[:, frame : frame + 38]).save(folder / name / f"{frame}.png")
    return folder


@pytest.fixture(scope="module")
def video_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "video"
    build_tiny_video_pipeline().save_pretrained(folder)
    return folder


def command(*arguments) -> int:
    """`qartsr evaluate`; usage errors of argparse are exit codes as well."""
    try:
        return main(["evaluate", *map(str, arguments), "--device", "cpu"])
    except SystemExit as stopped:
        return stopped.code


def test_rows_of_bicubic_video_and_image_models(clips):
    said = []
    models = {"video": build_tiny_video_pipeline(), "other": build_tiny_video_pipeline(seed=1), "image": build_tiny_pipeline()}
    models["image"].set_progress_bar_config(disable=True)
    rows = evaluate_clips(models, clips, progress=lambda clip, model: said.append((clip, model)))
    assert [row.name for row in rows] == ["bicubic", "video", "other", "image"] and len(said) == 8
    assert all(row.images == 2 and {"psnr_y", "ssim_y", "temporal_error"} <= row.values.keys() for row in rows)
    assert "psnr_y_to_full_precision" in rows[2].values and "psnr_y_to_full_precision" not in rows[1].values
    assert rows[1].gain == pytest.approx(rows[1].values["psnr_y"] - rows[0].values["psnr_y"])
    assert rows[1].closer_than_bicubic is None and rows[2].closer_than_bicubic is not None
    assert "temporal error" in markdown(rows) and "s a frame" in markdown(rows)
    same = evaluate_clips(
        {"video": models["video"], "again": models["video"]}, {"one": read_clip("one", clip_files(clips)["one"])}
    )
    assert same[2].values["psnr_y_to_full_precision"] == np.inf and same[2].values["psnr_y"] == rows[1].per_image["psnr_y"][0]


def test_values_stand_at_the_place_of_their_clip():
    still, moving = (np.random.default_rng(seed).integers(0, 256, (seed, 24, 28, 3), np.uint8) for seed in (1, 3))
    rows = evaluate_clips({}, {"a": still, "b": moving, "c": still}, peers={"lanczos": lanczos})
    for row in rows:
        before, value, after = row.per_image["temporal_error"]
        assert np.isnan([before, after]).all() and row.values["temporal_error"] == value > 0 and row.images == 3
        assert json.dumps(row.to_json(), allow_nan=False)
    (alone, _) = evaluate_clips({}, {"a": still}, peers={"lanczos": lanczos})
    assert "temporal_error" not in alone.values


def test_warping_error_of_known_and_of_estimated_motion():
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).resize((120, 100))
    clip = np.stack([np.asarray(base)[10 + step : 74 + step, 10 + 2 * step : 74 + 2 * step] for step in range(3)])
    flows = [np.full((64, 64, 2), (1.0, 2.0))] * 2
    known = evaluate_clips({}, {"pan": clip}, metrics=["e_warp"], flows={"pan": flows}, peers={"lanczos": lanczos})
    estimated = evaluate_clips({}, {"pan": clip}, metrics=["psnr_y", "e_warp"], peers={"lanczos": lanczos})
    for exact, by_flow in zip(known, estimated, strict=True):
        assert exact.values["e_warp"] == pytest.approx(by_flow.values["e_warp"], rel=0.3)
    model = build_tiny_video_pipeline()
    rows = evaluate_clips({"first": model, "same": model}, {"pan": clip}, metrics=["e_warp"], flows={"pan": flows}, frames=2)
    assert rows[1].e_warp_over_full_precision is None and rows[2].e_warp_over_full_precision == pytest.approx(1)
    assert "E_warp over full precision's" in markdown(rows)
    single = evaluate_clips({}, {"still": clip[:1]}, metrics=["psnr_y", "e_warp"], peers={"lanczos": lanczos})
    assert "e_warp" not in single[0].values and "temporal_error" not in single[0].values


def test_command_writes_report_table_and_film_strips(clips, video_folder, tmp_path, capsys):
    image, report, strips = tmp_path / "image", tmp_path / "report.json", tmp_path / "strips"
    build_tiny_pipeline().save_pretrained(image)
    options = ["--frames", 2, "--lanczos", "--metrics", "e_warp", "--output", report, "--pictures", strips]
    assert command(video_folder, image, "--data", clips, *options) == 0
    written = json.loads(report.read_text())
    assert written["data"]["clips"] == {"one": 2, "two": 2} and written["data"]["count"] == 2 and written["data"]["files"] == 6
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["bicubic", "lanczos", "video", "image"]
    assert rows["video"]["color_fix"] == "adain" and rows["image"]["color_fix"] == "wavelet"
    assert {"e_warp", "temporal_error", "seconds_a_frame", "e_warp_over_full_precision"} <= rows["image"].keys()
    assert len(rows["video"]["per_picture"]["e_warp"]) == 2
    text = report.with_suffix(".md").read_text()
    assert "2 clips (4 frames) of clips" in text and "one.png" in text and "2 clips (4 frames)" in capsys.readouterr().out
    with Image.open(strips / "one.png") as strip:  # two frames of 36 pixels, five clips, four differences
        assert strip.size == (2 * 36 + 4, 9 * (28 + 32))


def test_video_files_are_clips(tmp_path, video_folder, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    make_clip(folder / "a.mp4", moving(3, 48, 48))
    assert clip_files(folder) == {"a.mp4": [folder / "a.mp4"]}
    clip = read_clip("a.mp4", [folder / "a.mp4"], frames=2)
    assert clip.shape == (2, 48, 48, 3) and clip.dtype == np.uint8
    assert command("--lanczos", "--data", folder) == 0
    assert "1 clips (3 frames)" in capsys.readouterr().out
    whole = (folder / "a.mp4").read_bytes()
    (folder / "a.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VideoFileError, match="a.mp4"):
        read_clip("a.mp4", [folder / "a.mp4"])


def test_clips_with_more_than_8_bits_are_refused(tmp_path):
    make_clip(tmp_path / "deep.mkv", moving(1), codec="ffv1", format="yuv420p10le")
    with pytest.raises(VideoFileError, match="10 bits a channel"):
        read_clip("deep.mkv", [tmp_path / "deep.mkv"])


def test_what_cannot_be_measured_is_refused(clips, tmp_path, capsys, video_folder):
    with pytest.raises(ValueError, match="`models` is empty"):
        evaluate_clips({}, clips)
    model = {"video": build_tiny_video_pipeline()}
    with pytest.raises(FileNotFoundError):
        evaluate_clips(model, tmp_path / "none")
    with pytest.raises(ValueError, match="`data` is empty"):
        evaluate_clips(model, {})
    with pytest.raises(ValueError, match="small: .* needs a frame"):
        evaluate_clips(model, {"small": np.zeros((2, 12, 40, 3), np.uint8)})
    with pytest.raises(ValueError, match="float.* must be a uint8 array|uint8 array .* float"):
        evaluate_clips(model, {"floats": np.zeros((2, 32, 40, 3), np.float32)})
    with pytest.raises(ValueError, match="two rows named 'video'"):
        evaluate_clips(model, clips, peers={"video": lanczos})
    with pytest.raises(ValueError, match="broken made a frame that is not finite or not of"):
        evaluate_clips({}, clips, peers={"broken": lambda low: low})
    with pytest.raises(ValueError, match="e_warp is measured on clips"):
        evaluate("tiny-fp", [Image.new("RGB", (32, 32))], metrics=["e_warp"])
    for options, message in (
        ((video_folder, "--bypass"), "--bypass is for images"),
        ((video_folder, "--degradation", "real"), "--degradation is for images"),
        (("--lanczos", "--clips", "--color-fix", "adain"), "--color-fix is for images"),
        (("--lanczos", "--frames", 2), "--frames is for clips"),
    ):
        assert command(*options, "--data", clips) != 0
        assert message in capsys.readouterr().err
    Image.new("RGB", (8, 9)).save(clips / "one" / "3.png")
    with pytest.raises(ValueError, match="must have one size"):
        evaluate_clips(model, clips)


def test_without_scikit_image_the_message_names_the_command(clips, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    with pytest.raises(ImportError, match=r"pip install 'qartsr\[metrics\]'"):
        evaluate_clips({}, clips, metrics=["e_warp"], peers={"lanczos": lanczos})


def test_clips_that_a_model_was_made_with_are_refused(clips, video_folder, tmp_path):
    from qartsr_pipeline.calibration.data.fingerprint import photographs_record

    record = {"data": photographs_record(sorted((clips / "one").iterdir()))}
    (video_folder / "quantization.json").write_text(json.dumps(record))
    try:
        with pytest.raises(ValueError, match="measure on images that no model has seen"):
            evaluate_clips(video_folder, clips)
    finally:
        (video_folder / "quantization.json").unlink()


def test_example_of_the_docstring():
    found = doctest.DocTestFinder(recurse=False).find(evaluation.evaluate_clips, globs={})
    assert sum(doctest.DocTestRunner().run(example).failed for example in found) == 0 and found
