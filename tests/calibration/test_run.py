"""The command `qartsr quantize`, from its arguments to the folder, the record and the report."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from recipes_for_tests import SMALL
from safetensors import SafetensorError

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration import carry_out, job, timestep
from qartsr_pipeline.calibration.arguments import RunArguments
from qartsr_pipeline.calibration.data.fingerprint import check_no_overlap, file_digests
from qartsr_pipeline.calibration.image_family import SAMPLE, ImageFamily
from qartsr_pipeline.calibration.training import losses
from qartsr_pipeline.calibration.training.steps import Training
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.cli.quantize import arguments_of

TINY = ["--steps", "6", "--set", *SMALL]


def quantize(*arguments: object, code: int = 0) -> None:
    """Runs the command, which ends with this exit code."""
    assert main(["quantize", *map(str, arguments)]) == code


@pytest.fixture
def small_picture(tmp_path):
    """Arguments: a folder of one small photograph for the report."""
    folder = tmp_path / "evaluated"
    folder.mkdir()
    Image.open(SAMPLE).crop((0, 0, 64, 64)).save(folder / "crop.png")
    return ["--evaluate", str(folder)]


def test_the_command_quantizes_on_procedural_pictures_and_reports(
    tiny_folder, small_picture, plots, tmp_path, capsys, monkeypatch
):
    output = tmp_path / "run"
    monkeypatch.setattr(job, "choose_perceptual", lambda kind, weights: ("encoder", "it is not at hand"))
    (tiny_folder / "README.md").write_text("---\nlicense: bigscience-openrail-m\n---\n# tiny\n")
    quantize(str(tiny_folder), "--bits", "w3a4", "--output", str(output), *small_picture, *TINY, "keep={unet.mid_block*: w16a16}")
    loaded = QArtSRPipeline.from_pretrained(output / "model")
    assert "DeployedConv2d" not in repr(loaded.unet.mid_block)
    assert loaded.vae.encoder.mid_block.resnets[0].conv1.spec.weight_bits == 3
    record = json.loads((output / "model" / "quantization.json").read_text())
    assert record["recipe"]["steps"] == 6 and record["bits"] == "w3a4" and record["data"] == {"procedural": "dead leaves"}
    assert record["perceptual"] == "features of the full-precision VAE encoder" and record["no_lpips"] == "it is not at hand"
    card = (output / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: bigscience-openrail-m\n")
    assert "W3A4" in card and "6 steps, seed 0, on procedural" in card
    page = (output / "report" / "index.html").read_text()
    assert "features of the full-precision VAE encoder" in page and "w3a4" in page
    assert {"losses.png", "layers.png", "bounds.png"} <= {path.name for path in (output / "report").iterdir()}
    said = capsys.readouterr().out
    assert "written:" in said and "features of the full-precision VAE encoder (not LPIPS: it is not at hand)\n" in said
    quantize(str(tiny_folder), "--output", str(output), *TINY, code=2)
    assert "continue it with --resume" in capsys.readouterr().err
    quantize(str(output / "model"), "--output", str(tmp_path / "again"), *TINY, code=2)
    assert "quantized already" in capsys.readouterr().err


def test_resuming_takes_the_arguments_of_the_run(tiny_folder, small_picture, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    real = carry_out.calibrate

    def stopped(*arguments):
        result = real(*arguments)
        result.stopped = True
        return result

    monkeypatch.setattr(carry_out, "calibrate", stopped)
    quantize(str(tiny_folder), "--bits", "w8a8", "--output", str(output), *small_picture, *TINY, code=130)
    assert f"--resume --output {output}" in capsys.readouterr().err
    assert (output / "state.pt").exists() and not (output / "model").exists()
    monkeypatch.setattr(carry_out, "calibrate", real)
    for changed, said in (
        (["--timestep", "20"], "timestep is 'keep' there, not '20'"),
        (["--seed", "1"], "seed is 0 there, not 1"),
    ):
        quantize("--resume", "--output", str(output), *changed, code=2)
        assert said in capsys.readouterr().err
    arguments = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(arguments | {"bits": "W8A8"}))  # as runs from before have it
    moved, others = tiny_folder.rename(tmp_path / "moved"), Path(small_picture[1]).rename(tmp_path / "others")
    measured = []
    make_report = ImageFamily.report
    monkeypatch.setattr(ImageFamily, "report", lambda *given: measured.extend(given[1].evaluation) or make_report(*given))
    quantize(str(moved), "--resume", "--output", str(output), "--evaluate", str(others))
    assert measured == [others / "crop.png"]
    assert json.loads((output / "model" / "quantization.json").read_text())["bits"] == "w8a8"


@pytest.mark.parametrize(
    ("in_memory", "evaluate", "said"),
    [
        ({"data_in_memory": "a hash"}, True, "with the images to calibrate on in memory"),
        ({"model_in_memory": True}, True, "with the model in memory"),
        ({"evaluate_in_memory": True}, False, "or name a folder with --evaluate"),
        ({"evaluate_in_memory": True}, True, None),
    ],
)
def test_a_run_of_what_was_in_memory_is_not_continued_with_something_else(small_picture, tmp_path, in_memory, evaluate, said):
    (tmp_path / "run.json").write_text(RunArguments(**in_memory).to_json())
    given = {"evaluate": small_picture[1]} if evaluate else {}
    if said is None:
        assert arguments_of(given, tmp_path, resume=True).evaluate == small_picture[1]
        return
    with pytest.raises(ValueError, match=said):
        arguments_of(given, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "w5a4"], "weight_bits is 5"),
        (["--timestep", "search", "--recipe", "svdquant", "--start", "tiny-w4a4"], "on another grid than that of SVDQuant"),
        (["--timestep", "soon"], "expected keep, search, or a number"),
        (["--timestep", "1000"], "expected keep, search, or a number from 0 to 999"),
        (["--bits", "4bit"], "'4bit', expected a form such as w4a4"),
        (["--recipe", "nonesuch"], "no recipe 'nonesuch'; there are"),
        (["--set", "layer.rank=4"], "layer.rank=4: no such key"),
        (["--data", "no-such-folder"], "no-such-folder"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(tiny_folder, tmp_path, capsys, arguments, said):
    quantize(str(tiny_folder), "--output", str(tmp_path / "new"), *arguments, code=2)
    error = capsys.readouterr().err
    assert said in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("phase", "side", "held_out", "said"),
    [
        ("pixel:2:1e-4:192:1", None, "1", "no image is at least 224 pixels"),
        ("pixel:2:1e-4:32:1", 120, "1", "no image is at least 160 pixels"),  # which moving the model needs
        ("pixel:2:1e-4:32:1", None, "4", "all 4 images are kept for validation"),
    ],
)
@pytest.mark.parametrize("timestep", ["20", "search"])
def test_images_too_small_for_retraining_are_named_before_anything_is_made(
    photographs, tmp_path, capsys, timestep, phase, side, held_out, said
):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for path in photographs.iterdir():
        image = Image.open(path)
        image.crop((0, 0, *(side or min(image.size),) * 2)).save(folder / path.name)
    short = ["--phases", "latent:1:1e-4:32:1", "--full-phases", phase, "--held-out", held_out]
    output = tmp_path / "run"
    quantize("tiny-fp", "--output", output, "--data", folder, *TINY, "--timestep", timestep, *short, code=2)
    assert said in capsys.readouterr().err
    assert not output.exists(), "the corrected command would be refused"


def test_a_command_that_failed_before_its_first_step_can_be_corrected(tiny_folder, small_picture, tmp_path, capsys):
    output = tmp_path / "run"
    quantize(str(tiny_folder), "--bits", "w16a16", "--output", str(output), *small_picture, *TINY, code=2)
    assert "w16a16, which quantizes nothing" in capsys.readouterr().err
    (tiny_folder / "vae" / "config.json").rename(tiny_folder / "config.json")
    quantize(str(tiny_folder), "--output", str(output), *small_picture, *TINY, code=2)  # once the run has its folder
    (tiny_folder / "config.json").rename(tiny_folder / "vae" / "config.json")
    assert list(output.iterdir()) == []
    quantize(str(tiny_folder), "--bits", "W4A16", "--output", str(output), *small_picture, *TINY)
    assert json.loads((output / "model" / "quantization.json").read_text())["bits"] == "w4a16"


def test_a_disk_that_is_full_at_the_end_loses_no_step(tiny_folder, small_picture, tmp_path, monkeypatch, capsys):
    output, real = tmp_path / "run", QArtSRPipeline.save_pretrained

    def full(pipeline, folder):
        folder.mkdir()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(QArtSRPipeline, "save_pretrained", full)
    quantize(str(tiny_folder), "--output", str(output), *small_picture, *TINY, code=2)
    assert "No space left on device" in (error := capsys.readouterr().err) and str(output / "model") in error
    assert sorted(path.name for path in output.iterdir()) == ["run.json", "state.pt"]
    monkeypatch.setattr(QArtSRPipeline, "save_pretrained", real)
    monkeypatch.setattr(Training, "_step", lambda *_: pytest.fail("a step is made again"))
    quantize("--resume", "--output", str(output))
    assert (output / "model" / "model_index.json").exists()


def test_pictures_that_the_model_was_trained_on_are_not_reported_on(tiny_folder, photographs, tmp_path, capsys):
    record = {"data": {"files": file_digests(sorted(photographs.iterdir()))}}
    (tiny_folder / "training.json").write_text(json.dumps(record))
    quantize(str(tiny_folder), "--output", str(tmp_path / "new"), "--evaluate", str(photographs), *TINY, code=2)
    assert "picture_0.png is one of the photographs that" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_photographs_are_known_over_every_model_that_came_of_them(tiny_folder, small_picture, photographs, tmp_path, capsys):
    record = {"data": {"files": file_digests(sorted(photographs.iterdir()))}}
    (tiny_folder / "training.json").write_text(json.dumps(record))
    first = tmp_path / "first"
    quantize(str(tiny_folder), "--output", str(first), *small_picture, *TINY)  # on procedural images
    with pytest.raises(ValueError, match="picture_0.png is one of the photographs that model was made with"):
        check_no_overlap(sorted(photographs.iterdir()), first / "model")
    (tiny_folder / "training.json").unlink()
    for start in (first, first / "model"):
        arguments = ["--start", start, "--evaluate", photographs, "--output", tmp_path / "new"]
        quantize(tiny_folder, *arguments, *TINY, code=2)
        assert "picture_0.png is one of the photographs that model" in capsys.readouterr().err


@pytest.mark.slow
class FakeLpips(torch.nn.Module):
    """In the place of LPIPS over VGG16."""

    name = "LPIPS (fake)"

    def __init__(self, network, weights):
        super().__init__()
        assert (network, weights) == ("vgg", None)

    def forward(self, image, wanted):
        return (image - wanted).abs().mean()


def test_a_model_is_retrained_at_another_timestep_first(tiny_folder, small_picture, photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timestep, "Lpips", FakeLpips)
    output, short = tmp_path / "run", ["--phases", "latent:1:1e-4:64:1", "--full-phases", "pixel:2:1e-4:64:1", "--held-out", "1"]
    short += ["--retraining-loss", "l2+lpips"]
    arguments = [str(tiny_folder), "--output", str(output), "--data", str(photographs), *small_picture, *TINY, *short]
    quantize(*arguments, "--timestep", "search", "--timesteps", "20", "400", code=2)
    assert "at no timestep does bypassing the UNet cost 1 dB" in capsys.readouterr().err
    quantize("--resume", "--output", str(output), "--least-bypass-cost", "-100")
    record = json.loads((output / "model" / "quantization.json").read_text())
    retrained = record["retrained"]
    assert record["timestep"] == retrained["timestep"] in (20, 400) and retrained["phases"][0]["steps"] == 2
    assert (retrained["perceptual"], retrained["options"]["loss"]) == ("LPIPS (fake)", "l2")
    assert "picture_0.png" in record["data"]["files"] and "timestep" in (output / "report" / "index.html").read_text()
    assert QArtSRPipeline.from_pretrained(output / "model").config.timestep == retrained["timestep"]


def test_pictures_to_evaluate_must_not_be_calibrated_on(tiny_folder, photographs, tmp_path, capsys):
    folders = ["--data", str(photographs), "--evaluate", str(photographs)]
    quantize(str(tiny_folder), "--output", str(tmp_path / "new"), *folders, *TINY, code=2)
    assert "picture_0.png is among the files to calibrate on" in capsys.readouterr().err


def not_installed(*names):
    raise ImportError


def test_lpips_is_taken_where_all_that_it_needs_is_there(monkeypatch):
    monkeypatch.setattr(losses, "find_backbone", lambda network, weights: weights)
    monkeypatch.setattr(losses, "package_file", lambda *names: Path("there"))
    assert losses.choose_perceptual("auto", "vgg16.pth") == ("lpips", None)
    assert losses.choose_perceptual("auto") == ("encoder", "there is no VGG16 backbone: give its file, or set QARTSR_BACKBONES")
    monkeypatch.setattr(losses, "package_file", not_installed)
    assert losses.choose_perceptual("auto", "vgg16.pth") == ("encoder", "the package lpips is not installed")
    assert losses.choose_perceptual("lpips") == ("lpips", None) and losses.choose_perceptual("encoder") == ("encoder", None)
