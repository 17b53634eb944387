"""Evaluation: the numbers are those of the pipeline's own output."""

from __future__ import annotations

import importlib.metadata
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from calibration import evaluate
from calibration.evaluation import Row
from calibration.evaluation_report import markdown, summarize
from qartsr_pipeline.image.metrics import psnr_y, ssim_y
from tiny_models import build_tiny_pipeline


@pytest.fixture
def two_models(tmp_path):
    """Folders of two full-precision models that differ."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        build_tiny_pipeline(seed).save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture(scope="module")
def small_photographs(photographs, tmp_path_factory):
    """Two of them, cut to 75 x 70 pixels."""
    folder = tmp_path_factory.mktemp("small")
    for index in range(2):
        with Image.open(photographs / f"picture_{index}.png") as picture:
            picture.crop((60, 60, 135, 130)).save(folder / f"picture_{index}.png")
    return folder


def unit(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float64) / 255


def test_report_agrees_with_the_pipeline(two_models, small_photographs, tmp_path, capsys):
    report_path, pictures = tmp_path / "report.json", tmp_path / "pictures"
    options = ["--data", small_photographs, "--limit", 2, "--bypass", "--output", report_path, "--pictures", pictures]
    evaluate.main([str(argument) for argument in [*two_models, *options, "--device", "cpu"]])
    report = json.loads(report_path.read_text())
    assert report["data"]["count"] == 2 and report["data"]["pictures"] == ["picture_0.png", "picture_1.png"]
    assert report["hardware"] and report["versions"]["torch"] == importlib.metadata.version("torch")
    rows = {(row["name"], row["color_fix"]): row for row in report["rows"]}

    high = Image.open(small_photographs / "picture_1.png").crop((0, 0, 72, 68))
    low = high.resize((18, 17), Image.Resampling.BICUBIC)
    bicubic = rows["bicubic", None]
    expected = psnr_y(unit(low.resize(high.size, Image.Resampling.BICUBIC)), unit(high))
    assert bicubic["per_picture"]["psnr_y"][1] == pytest.approx(expected, abs=0.02)  # Pillow rounds otherwise
    outputs = {}
    for seed, name in enumerate(("first", "second")):
        for color_fix in ("wavelet", None):
            pipeline = build_tiny_pipeline(seed)
            made = outputs[name, color_fix] = pipeline(low, color_fix=color_fix, tile_size=256).images[0]
            values = rows[name, color_fix]["per_picture"]
            assert values["psnr_y"][1] == pytest.approx(psnr_y(unit(made), unit(high)), abs=0.02)
            assert values["ssim_y"][1] == pytest.approx(ssim_y(unit(made), unit(high)), abs=2e-3)
    second = rows["second", None]
    distance = psnr_y(unit(outputs["second", None]), unit(outputs["first", None]))
    assert second["per_picture"]["psnr_y_to_full_precision"][1] == pytest.approx(distance, abs=0.02)
    assert second["psnr_y"] == pytest.approx(np.mean(second["per_picture"]["psnr_y"]))
    assert second["gain"] == pytest.approx(second["psnr_y"] - bicubic["psnr_y"])
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds.count("bypass") == 4 and kinds.count("autoencoder") == 2 and kinds.count("model") == 4
    with Image.open(pictures / "picture_1.png") as sheet:
        assert sheet.width > 4 * 72
    said = capsys.readouterr().out
    assert "| bicubic " in said and "second, UNet bypassed" in said and f"written: {report_path}" in said


def test_share_of_gain_and_table():
    def row(name, kind, values, color_fix=None, **more):
        return Row(name, kind, color_fix, name == "full", {"psnr_y": values, **more})

    rows = [
        row("bicubic", "bicubic", [28.0, 30.0]),
        row("full", "model", [30.0, 32.0]),
        row("four", "model", [29.0, 32.0], psnr_y_to_full_precision=[float("inf"), 33.0]),
    ]
    summary = summarize(rows)
    assert summary[1]["gain"] == 2.0 and "share_of_gain" not in summary[1]
    assert summary[2]["share_of_gain"] == 0.75
    assert summary[2]["psnr_y_to_full_precision"] == 33.0
    assert json.dumps(summary, allow_nan=False)
    table = markdown(summary).splitlines()
    assert len(table) == 5 and len({len(line) for line in table}) == 1
    assert "75.0%" in table[-1] and "as they come" in table[-1] and "s a picture" not in table[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["MODEL", "--data", "nowhere"], "the photograph folder 'nowhere' does not exist"),
        (["nomodel", "--data", "PHOTOS"], "There is no folder 'nomodel'"),
        (["MODEL", "MODEL", "--data", "PHOTOS"], "given twice"),
        (["MODEL", "--data", "PHOTOS", "--metrics", "lpips"], r"pip install 'qartsr[metrics]'"),
        (["MODEL", "--data", "PHOTOS", "--limit", "0"], "above 0"),
        (["MODEL", "--data", "PHOTOS", "--output", "nowhere/report.json"], "not a file name in a folder"),
    ],
)
def test_errors_say_what_to_do(arguments, message, tiny_folder, photographs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    named = {"MODEL": str(tiny_folder), "PHOTOS": str(photographs)}
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([named.get(argument, argument) for argument in arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_further_metrics_get_pictures_in_order(tiny_folder, small_photographs, monkeypatch, capsys):
    """A stand-in for pyiqa: one metric with a reference, one without."""

    class Metric:
        def __init__(self, name):
            self.metric_mode = "FR" if name == "lpips" else "NR"

        def __call__(self, *pictures):
            assert len(pictures) == (2 if self.metric_mode == "FR" else 1)
            return torch.tensor(0.25) if len(pictures) == 1 else (pictures[0] - pictures[1]).abs().mean()

    module = type(sys)("pyiqa")
    module.create_metric = lambda name, device: Metric(name)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    evaluate.main(
        [str(tiny_folder), "--data", str(small_photographs), "--limit", "1", "--no-color-fix", "--metrics", "lpips", "niqe"]
    )
    said = capsys.readouterr().out
    assert "LPIPS" in said and "NIQE" in said and "0.2500" in said and "wavelet" not in said
