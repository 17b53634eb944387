"""Evaluation: the numbers are those of the pipeline's own output."""

from __future__ import annotations

import doctest
import errno
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from qartsr_pipeline.calibration.data.fingerprint import file_digests, overlap
from qartsr_pipeline.calibration.evaluation import api, evaluate
from qartsr_pipeline.calibration.evaluation.measurement import Candidate, Evaluation
from qartsr_pipeline.calibration.evaluation.originals import find_pairs, originals_of, read_pair
from qartsr_pipeline.calibration.evaluation.reported_results import method_and_bits
from qartsr_pipeline.calibration.evaluation.rows import RowKey, make_rows, markdown
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.image.metrics import psnr_y, ssim_y
from qartsr_pipeline.quantization.calibrating import prepare
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
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


def command(*arguments) -> int:
    """`qartsr evaluate`; usage errors of argparse are exit codes as well."""
    try:
        return main(["evaluate", *map(str, arguments)])
    except SystemExit as stopped:
        return stopped.code


def unit(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float64) / 255


def test_report_agrees_with_the_pipeline(two_models, small_photographs, tmp_path, capsys):
    report_path, pictures = tmp_path / "report.json", tmp_path / "pictures"
    options = ["--data", small_photographs, "--limit", 2, "--bypass", "--output", report_path, "--pictures", pictures]
    assert command(*two_models, *options, "--device", "cpu") == 0
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
    likeness = ssim_y(unit(outputs["second", None]), unit(outputs["first", None]))
    assert second["per_picture"]["ssim_y_to_full_precision"][1] == pytest.approx(likeness, abs=2e-3)
    enlarged = unit(low.resize(high.size, Image.Resampling.BICUBIC))
    bicubic_distance = psnr_y(enlarged, unit(outputs["first", None]))
    assert second["per_picture"]["bicubic_to_full_precision"][1] == pytest.approx(bicubic_distance, abs=0.02)
    differences = np.subtract(*(second["per_picture"][f"{of}_to_full_precision"] for of in ("psnr_y", "bicubic")))
    assert second["closer_than_bicubic"] == pytest.approx(differences.mean())
    assert second["psnr_y"] == pytest.approx(np.mean(second["per_picture"]["psnr_y"]))
    assert second["gain"] == pytest.approx(second["psnr_y"] - bicubic["psnr_y"])
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds.count("bypass") == 4 and kinds.count("autoencoder") == 2 and kinds.count("model") == 4
    with Image.open(pictures / "picture_1.png") as sheet:
        assert sheet.width > 4 * 72
    said = capsys.readouterr().out
    assert "| bicubic " in said and "second, UNet bypassed" in said and f"written: {report_path}" in said
    text = (tmp_path / "report.md").read_text()
    assert "closer to it than bicubic" in text and "(<pictures/picture_1.png>)" in text and "(<pictures/compare.html>)" in text
    page = (pictures / "compare.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 2 and page.count("<li>") == 2 * 4  # bicubic, two models, the original


def test_share_of_gain_and_table():
    rows = make_rows(
        {
            RowKey("bicubic", "bicubic"): {"psnr_y": [28.0, 30.0]},
            RowKey("full", "model", None, True): {"psnr_y": [30.0, 32.0]},
            RowKey("four", "model", None, False): {
                "psnr_y": [29.0, 32.0],
                "seconds": [1.0, 2.0],
                "psnr_y_to_full_precision": [float("inf"), 33.0],
                "bicubic_to_full_precision": [30.0, 30.0],
                "niqe": [5.0, 6.0],
                "lpips_vgg_to_full_precision": [0.1, 0.2],
            },
        }
    )
    bicubic, full, four = rows
    assert bicubic.gain is None and bicubic.images == 2 and bicubic.seconds is None
    assert full.gain == 2.0 and full.share_of_gain is None and full.closer_than_bicubic is None
    assert four.share_of_gain == 0.75 and four.seconds == 1.5 and four.closer_than_bicubic == 3.0
    assert four.values["psnr_y_to_full_precision"] == 33.0 and "seconds" not in four.values
    assert json.loads(json.dumps([row.to_json() for row in rows], allow_nan=False))[2]["per_picture"][
        "psnr_y_to_full_precision"
    ] == [None, 33.0]
    table = markdown(rows).splitlines()
    assert len(table) == 5 and len({len(line) for line in table}) == 1
    assert "LPIPS (VGG) to full precision" in table[0] and "0.1500" in table[-1]
    assert "75.0%" in table[-1] and "as they come" in table[-1] and "NIQE" in table[0] and "5.5000" in table[-1]
    assert "s an image" not in markdown(rows[:2]) and "bicubic_to" not in table[0].lower()


def test_the_examples_run():
    found = doctest.DocTestFinder().find(api.evaluate, "evaluate", module=api)
    assert len(found) == 1 and len(found[0].examples) > 4
    runner = doctest.DocTestRunner()
    runner.run(found[0])
    assert runner.failures == 0


def test_models_and_images_are_taken_in_every_form(tiny_pipeline, tiny_folder, small_photographs, capsys):
    """A pipeline or its folder, one or several or named; files or what is in them: the numbers are the same."""
    paths = sorted(small_photographs.iterdir())[:1]
    image = Image.open(paths[0])
    pixels = np.asarray(image.convert("RGB"))
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    calls = []
    options = {"color_fixes": [None], "metrics": ["psnr_y"]}
    rows = [
        evaluate(tiny_pipeline, paths, progress=lambda *done: calls.append(done), **options),
        evaluate(str(tiny_folder), [image], **options),
        evaluate([tiny_folder], [pixels], **options),
        evaluate({"mine": tiny_folder}, [tensor], **options),
    ]
    assert [each[1].name for each in rows] == ["model 1", "tiny", "tiny", "mine"]
    values = [[row.values["psnr_y"] for row in each] for each in rows]
    assert all(each == pytest.approx(values[0], abs=1e-6) for each in values)
    assert {name for each in rows for row in each for name in row.values} == {"psnr_y"} and all(len(each) == 2 for each in rows)
    assert calls == [(str(paths[0]), 1, 2), (str(paths[0]), 2, 2)]
    said = capsys.readouterr()
    assert not said.out and not said.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"data": []}, "empty list"),
        ({"models": []}, "`models` is empty"),
        ({"color_fixes": []}, "`color_fixes` is empty"),
        ({"color_fixes": ["sepia"]}, "no colour alignment 'sepia'"),
        ({"degradation": "fax"}, "no degradation 'fax'; expected bicubic or realesrgan"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message, tiny_pipeline):
    arguments = {"models": tiny_pipeline, "data": [np.zeros((32, 32, 3), np.uint8)], **arguments}
    with pytest.raises(ValueError, match=message):
        evaluate(arguments.pop("models"), arguments.pop("data"), **arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["MODEL", "--data", "nowhere"], "the photograph folder 'nowhere' does not exist"),
        (["MODEL", "--data", __file__], "is a file: name the folder that it is in"),
        (["nomodel", "--data", "PHOTOS"], "There is no folder 'nomodel'"),
        (["MODEL", "MODEL", "--data", "PHOTOS"], "given twice"),
        (["MODEL", "--data", "PHOTOS", "--metrics", "musiq"], r"pip install 'qartsr[iqa]'"),
        (["MODEL", "--data", "PHOTOS", "--metrics", "lpips", "--backbones", "PHOTOS"], "no backbone alexnet at"),
        (["--data", "PHOTOS"], "nothing to measure"),
        (["MODEL", "--data", "PHOTOS", "--outputs", "theirs"], "must be NAME=FOLDER"),
        (["MODEL", "--data", "PHOTOS", "--outputs", "a=PHOTOS", "--outputs", "a=PHOTOS"], "two rows of that name"),
        (["MODEL", "--data", "PHOTOS", "--no-ground-truth"], "without ground truth, psnr_y, ssim_y can only"),
        (["MODEL", "--data", "PHOTOS", "--no-ground-truth", "--bypass"], "needs ground truth"),
        (["MODEL", "--data", "PHOTOS", "--limit", "0"], "above 0"),
        (["MODEL", "--data", "PHOTOS", "--output", "nowhere/report.json"], "not a file name in a folder"),
        (["MODEL"], "--data is needed"),
        (["MODEL", "--data", "PHOTOS", "--ours", "report.json"], "--ours goes with `reproduce` alone"),
        (["MODEL", "--data", "PHOTOS", "--output", "report.md"], "name the JSON file"),
        (["reproduce", "--ours", "PHOTOS/picture_0.png"], "not a report of `qartsr evaluate`"),
    ],
)
def test_errors_say_what_to_do(arguments, message, tiny_folder, photographs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    replaced = [argument.replace("PHOTOS", str(photographs)).replace("MODEL", str(tiny_folder)) for argument in arguments]
    assert command(*replaced) == 2 and message in capsys.readouterr().err


def test_a_full_disk_is_reported_without_an_option_that_is_not_there(
    tiny_folder, small_photographs, tmp_path, monkeypatch, capsys
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    output = tmp_path / "report.json"
    assert command(tiny_folder, "--data", small_photographs, "--limit", 1, "--no-color-fix", "--output", output) == 2
    said = capsys.readouterr().err
    assert f"{output}" in said and "No space left" in said and "--resume" not in said


def test_further_metrics_get_pictures_in_order(tiny_folder, small_photographs, monkeypatch, capsys):
    """A stand-in for pyiqa: one metric with a reference, one without."""

    class Metric:
        def __init__(self, name):
            self.metric_mode = "FR" if name == "pieapp" else "NR"

        def __call__(self, *pictures):
            assert len(pictures) == (2 if self.metric_mode == "FR" else 1)
            return torch.tensor(0.25) if len(pictures) == 1 else (pictures[0] - pictures[1]).abs().mean()

    module = type(sys)("pyiqa")
    module.create_metric = lambda name, device: Metric(name)
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    options = ["--limit", 1, "--no-color-fix", "--metrics", "pieapp", "niqe"]
    assert command(tiny_folder, "--data", small_photographs, *options) == 0
    said = capsys.readouterr().out
    assert "PIEAPP" in said and "NIQE" in said and "0.2500" in said and "wavelet" not in said


LAYOUTS = {
    "DIV2K": ("DIV2K_valid_HR/{}.png", "DIV2K_valid_LR_bicubic/X4/{}x4.png"),
    "RealSR": ("Canon/Test/4/{}_HR.png", "Canon/Test/4/{}_LR4.png"),
    "HR and LR": ("test_HR/{}.png", "test_LR/{}.png"),
}


def make_pairs(folder, high_name, low_name):
    """Two pairs, of 67 x 61 and 16 x 15 pixels; what is low could not be made from what is high."""
    random = np.random.default_rng(3)
    for scene in ("Canon_001", "0802"):
        for name, (width, height) in ((high_name, (67, 61)), (low_name, (16, 15))):
            path = folder / name.format(scene)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_found_and_their_low_resolution_is_what_is_enlarged(layout, tiny_pipeline, tmp_path):
    make_pairs(tmp_path, *LAYOUTS[layout])
    found, pairs = find_pairs(tmp_path)
    assert found == layout and [pair.high for pair in pairs] == [
        tmp_path / LAYOUTS[layout][0].format(n) for n in ("0802", "Canon_001")
    ]
    assert [pair.low for pair in pairs] == [tmp_path / LAYOUTS[layout][1].format(name) for name in ("0802", "Canon_001")]
    high, low = read_pair(pairs[0])
    assert high.shape == (1, 3, 60, 64) and low.shape == (1, 3, 15, 16)
    row = evaluate({"tiny": tiny_pipeline}, pairs[:1], color_fixes=[None])[1]
    made = tiny_pipeline(Image.open(pairs[0].low), color_fix=None, tile_size=256).images[0]
    assert row.values["psnr_y"] == pytest.approx(psnr_y(unit(made), high[0].permute(1, 2, 0).double().numpy()), abs=0.02)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_missing_partner_and_a_wrong_size_are_named(layout, lacking, tmp_path):
    make_pairs(tmp_path, *LAYOUTS[layout])
    high, low = (tmp_path / name.format("Canon_001") for name in LAYOUTS[layout])
    Image.new("RGB", (67, 61)).save(low)
    with pytest.raises(ValueError) as wrong:
        find_pairs(tmp_path)
    assert all(text in str(wrong.value) for text in (str(high), str(low), "67 x 61", "16 x 15"))
    gone, left = (high, low) if lacking == 0 else (low, high)
    gone.unlink()
    with pytest.raises(FileNotFoundError) as missing:
        find_pairs(tmp_path)
    assert str(left) in str(missing.value) and gone.name in str(missing.value)


def test_pictures_that_a_model_was_made_with_are_refused(tiny_folder, small_photographs, tmp_path, capsys):
    seen = tmp_path / "renamed.png"
    shutil.copy(small_photographs / "picture_1.png", seen)
    recorded = file_digests([seen])
    assert recorded == {"renamed.png": hashlib.sha256(seen.read_bytes()).hexdigest()}
    assert overlap(sorted(small_photographs.iterdir()), recorded) == [small_photographs / "picture_1.png"]
    record = tiny_folder / "quantization.json"
    record.write_text(json.dumps({"data": {"files": recorded}}))
    assert command(tiny_folder, "--data", small_photographs) == 2
    assert f"{small_photographs / 'picture_1.png'} is one of the photographs" in capsys.readouterr().err
    assert command(tiny_folder, "--data", small_photographs, "--limit", 1) == 0  # the other one was not seen
    assert "not checked" not in capsys.readouterr().out


def test_files_of_one_name_keep_their_own_digest(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "picture.png").write_text(folder)
    assert list(file_digests(sorted(tmp_path.glob("*/*")))) == ["a/picture.png", "b/picture.png"]


def test_kept_full_precision_outputs_stand_in_for_the_model(small_photographs):
    """They give the rows that a full-precision model at the first place gives."""
    originals, references, seen = originals_of(small_photographs), {}, []
    other = Candidate("other", build_tiny_pipeline(1), full_precision=False)
    full = Candidate.of("full", build_tiny_pipeline(0))
    together = Evaluation([full, other], color_fixes=[None], references=references).run(originals)
    later = Evaluation([other], color_fixes=[None], references=references, on_image=seen.append)
    ours, expected = later.run(originals)[1], together[2]
    assert ours.name == expected.name == "other" and "psnr_y_to_full_precision" in ours.values
    assert ours.values == pytest.approx(expected.values, abs=1e-6)
    assert [(image.label, list(image.outputs)) for image in seen] == [
        (original.label, ["bicubic", "other", "original"]) for original in originals
    ]
    del references[originals[1].label]
    with pytest.raises(ValueError, match=r"picture_1.png: its full-precision output was not kept"):
        later.run(originals)


def test_a_simulated_model_measures_as_the_deployed_one(small_photographs):
    pipeline, photographs = build_tiny_pipeline(0), sorted(small_photographs.iterdir())[:1]
    assert Candidate.of("full", pipeline).full_precision
    folding = fold(pipeline.unet, pipeline.config.timestep, pipeline.prompt_embedding(1))
    schemes = {"unet": QuantizationScheme(LayerScheme(8, 8), folding=folding), "vae": QuantizationScheme(LayerScheme(8, 8))}

    def measured(change):
        for name, scheme in schemes.items():
            change(getattr(pipeline, name), scheme)
        row = evaluate({"w8a8": pipeline}, photographs, color_fixes=[None])[1]
        assert not row.full_precision
        return row.values["psnr_y"]

    assert measured(prepare) == pytest.approx(measured(freeze), abs=0.05)


def test_photographs_can_be_degraded_as_in_the_wild(small_photographs, tiny_folder, tmp_path):
    rows = {}
    for name in ("bicubic", "realesrgan", "realesrgan"):
        output = tmp_path / "report.json"
        arguments = [tiny_folder, "--data", small_photographs, "--limit", 1, "--no-color-fix", "--output", output]
        assert command(*arguments, "--degradation", name) == 0
        report = json.loads(output.read_text())
        assert report["settings"]["degradation"] == f"{name}, 8 bits"
        rows.setdefault(name, []).append([row["psnr_y"] for row in report["rows"]])
    assert rows["realesrgan"][0] == rows["realesrgan"][1] and rows["realesrgan"][0][0] < rows["bicubic"][0][0]


def test_reproduce_puts_ours_beside_the_paper(tmp_path, capsys):
    assert command("reproduce") == 0
    assert "| QArtSR | W2A2 | 25.51 | 0.4124 | 50.04 |" in capsys.readouterr().out
    rows = [
        {"name": "bicubic", "kind": "bicubic", "full_precision": None, "psnr_y": 27.48},
        {"name": "tiny-fp", "kind": "model", "full_precision": True, "psnr_y": 29.42},
        {"name": "tiny-w4a4", "kind": "model", "full_precision": False, "psnr_y": 28.79, "lpips": 0.25},
        {"name": "tiny-w4a4", "kind": "model", "full_precision": False, "psnr_y": 1.0},
        {"name": "svdquant-w2a2", "kind": "model", "full_precision": False, "psnr_y": 28.0},
    ]
    report = {"data": {"folder": "set", "count": 2}, "settings": {"degradation": "bicubic, 8 bits"}, "rows": rows}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert command("reproduce", "--ours", path) == 0
    said = capsys.readouterr().out
    assert "| QArtSR | W4A4 | 24.93 | 0.2914 | 67.98 | tiny-w4a4 | 28.79 | 0.2500 |  |" in said and " 1.00 " not in said
    assert "| SVDQuant | W2A2 | 18.99 | 0.4947 | 43.83 | svdquant-w2a2 | 28.00 |" in said
    assert "tiny-fp" in said and "set, 2 images" in said and "Not measured by us: MUSIQ" in said
    report["data"]["layout"] = "RealSR"  # which has a table of its own
    path.write_text(json.dumps(report))
    assert command("reproduce", "--ours", path) == 0
    said = capsys.readouterr().out
    assert "28.79" not in said[: said.index("RealSR, x4")] and "| tiny-w4a4 | 28.79 |" in said[said.index("RealSR, x4") :]
    assert method_and_bits({"name": "q_dm w3a3", "kind": "model", "full_precision": False}) == ("Q-DM", "w3a3")


def test_reproduce_goes_by_the_record_of_a_model_not_by_its_name(tmp_path, small_photographs, capsys):
    """Two runs, each of which wrote a folder called `model`."""
    recorded = {"one": ("MaxMin", "w4a4"), "two": ("QArtSR", "W2A2")}
    for seed, (name, (method, bits)) in enumerate(recorded.items()):
        pipeline = build_tiny_pipeline(seed)
        for model in (pipeline.unet, pipeline.vae):
            prepare(model, QuantizationScheme(LayerScheme(8, 8)))
            freeze(model, QuantizationScheme(LayerScheme(8, 8)))
        pipeline.save_pretrained(tmp_path / name / "model")
        record = {"recipe": {"method": method}, "bits": bits, "data": {"files": {"a": "b"}} if name == "one" else {}}
        (tmp_path / name / "model" / "quantization.json").write_text(json.dumps(record))
    folders = [str(tmp_path / name / "model") for name in recorded]
    report = tmp_path / "report.json"
    assert command(*folders, "--data", small_photographs, "--limit", 1, "--no-color-fix", "--output", report) == 0
    assert f"The records of {folders[1]} list no files" in capsys.readouterr().out
    assert command("reproduce", "--ours", report) == 0
    said = capsys.readouterr().out
    assert f"| MaxMin | W4A4 | 15.30 | 0.7940 | 46.27 | {folders[0]} |" in said
    assert f"| QArtSR | W2A2 | 25.51 | 0.4124 | 50.04 | {folders[1]} |" in said
