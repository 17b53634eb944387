"""The command `calibration/run.py`, from its arguments to the folder, the record and the report."""

import json

import pytest
from PIL import Image
from recipes_for_tests import SMALL

from calibration import run as command
from qartsr_pipeline import QArtSRPipeline

TINY = ["--steps", "6", "--set", *SMALL]


@pytest.fixture
def small_picture(tmp_path):
    """Arguments: a folder of one small photograph for the report."""
    folder = tmp_path / "evaluated"
    folder.mkdir()
    Image.open(command.SAMPLE).crop((0, 0, 64, 64)).save(folder / "crop.png")
    return ["--evaluate", str(folder)]


def test_the_command_quantizes_on_procedural_pictures_and_reports(tiny_folder, small_picture, tmp_path, capsys):
    output = tmp_path / "run"
    (tiny_folder / "README.md").write_text("---\nlicense: bigscience-openrail-m\n---\n# tiny\n")
    command.main(
        [str(tiny_folder), "--bits", "w3a4", "--output", str(output), *small_picture, *TINY, "keep={unet.mid_block*: w16a16}"]
    )
    loaded = QArtSRPipeline.from_pretrained(output / "model")
    assert "DeployedConv2d" not in repr(loaded.unet.mid_block)
    assert loaded.vae.encoder.mid_block.resnets[0].conv1.spec.weight_bits == 3
    record = json.loads((output / "model" / "quantization.json").read_text())
    assert record["recipe"]["steps"] == 6 and record["bits"] == "w3a4" and record["data"] == {"procedural": "dead leaves"}
    assert record["perceptual"] == "features of the full-precision VAE encoder"
    card = (output / "model" / "README.md").read_text()
    assert card.startswith("---\nlicense: bigscience-openrail-m\n")
    assert "W3A4" in card and "6 steps, seed 0, on procedural" in card
    page = (output / "report" / "index.html").read_text()
    assert "features of the full-precision VAE encoder" in page and "w3a4" in page
    assert "written:" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tiny_folder), "--output", str(output), *TINY])
    assert "continue it with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main([str(output / "model"), "--output", str(tmp_path / "again"), *TINY])
    assert "quantized already" in capsys.readouterr().err


def test_resuming_takes_the_arguments_of_the_run(tiny_folder, small_picture, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    real = command.quantize

    def stopped(*arguments, **kwargs):
        result = real(*arguments, **kwargs)
        result.stopped = True
        return result

    monkeypatch.setattr(command, "quantize", stopped)
    with pytest.raises(SystemExit, match="130"):
        command.main([str(tiny_folder), "--bits", "w8a8", "--output", str(output), *small_picture, *TINY])
    assert f"--resume --output {output}" in capsys.readouterr().err
    assert (output / "state.pt").exists() and not (output / "model").exists()
    monkeypatch.setattr(command, "quantize", real)
    command.main(["--resume", "--output", str(output)])
    assert json.loads((output / "model" / "quantization.json").read_text())["bits"] == "w8a8"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "w5a4"], "weight_bits is 5"),
        (["--timestep", "soon"], "expected keep, search, or a number"),
        (["--bits", "4bit"], "'4bit', expected a form such as w4a4"),
        (["--recipe", "nonesuch"], "no recipe 'nonesuch'; there are"),
        (["--set", "layer.rank=4"], "layer.rank=4: no such key"),
        (["--data", "no-such-folder"], "no-such-folder"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(tiny_folder, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tiny_folder), "--output", str(tmp_path / "new"), *arguments])
    error = capsys.readouterr().err
    assert said in error
    assert not (tmp_path / "new").exists()


def test_pictures_to_evaluate_must_not_be_calibrated_on(tiny_folder, photographs, tmp_path, capsys):
    folders = ["--data", str(photographs), "--evaluate", str(photographs)]
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tiny_folder), "--output", str(tmp_path / "new"), *folders, *TINY])
    assert "picture_0.png is among the photographs to calibrate on" in capsys.readouterr().err
