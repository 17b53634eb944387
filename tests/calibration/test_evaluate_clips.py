"""Models measured on clips."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qartsr_pipeline.calibration.data.clips import clip_files, read_clip
from qartsr_pipeline.calibration.evaluation import evaluate_clips
from qartsr_pipeline.calibration.evaluation.rows import markdown
from tiny_models import build_tiny_pipeline, build_tiny_video_pipeline


@pytest.fixture
def clips(tmp_path):
    """Two folders of three images each, 38 x 33 pixels."""
    for seed, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        base = np.random.default_rng(seed).integers(0, 256, (33, 44, 3), dtype=np.uint8)
        for frame in range(3):
            Image.fromarray(base[:, frame : frame + 38]).save(tmp_path / name / f"{frame}.png")
    return tmp_path


def test_rows_of_bicubic_video_and_image_models(clips):
    said = []
    models = {"video": build_tiny_video_pipeline(), "other": build_tiny_video_pipeline(seed=1), "image": build_tiny_pipeline()}
    models["image"].set_progress_bar_config(disable=True)
    rows = evaluate_clips(models, clips, progress=lambda clip, model: said.append((clip, model)))
    assert [row.name for row in rows] == ["bicubic", "video", "other", "image"] and len(said) == 8
    assert all(row.images == 2 and {"psnr_y", "ssim_y", "temporal_error"} <= row.values.keys() for row in rows)
    assert "psnr_y_to_full_precision" in rows[2].values and "psnr_y_to_full_precision" not in rows[1].values
    assert rows[1].gain == pytest.approx(rows[1].values["psnr_y"] - rows[0].values["psnr_y"])
    assert "temporal error" in markdown(rows)
    same = evaluate_clips(
        {"video": models["video"], "again": models["video"]}, {"one": read_clip("one", clip_files(clips)["one"])}
    )
    assert same[2].values["psnr_y_to_full_precision"] == np.inf and same[2].values["psnr_y"] == rows[1].per_image["psnr_y"][0]


def test_what_cannot_be_measured_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match="`models` is empty"):
        evaluate_clips({}, clips)
    model = {"video": build_tiny_video_pipeline()}
    with pytest.raises(FileNotFoundError):
        evaluate_clips(model, tmp_path / "none")
    with pytest.raises(ValueError, match="needs a frame"):
        evaluate_clips(model, {"small": np.zeros((2, 12, 40, 3), np.uint8)})
    Image.new("RGB", (8, 9)).save(clips / "one" / "3.png")
    with pytest.raises(ValueError, match="must have one size"):
        evaluate_clips(model, clips)
