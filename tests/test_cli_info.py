"""`qartsr info` and `qartsr demo`."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import shipped_labels
from qartsr_pipeline.cli import demo
from qartsr_pipeline.cli.main import COMMANDS, main
from qartsr_pipeline.image.comparison_sheet import comparison_sheet
from qartsr_pipeline.image_files import read_image
from qartsr_pipeline.kernels import BACKENDS
from qartsr_pipeline.offloading import keep_prepared
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.report import describe_model


def test_info_names_every_component_and_says_that_nothing_is_quantized(tiny_folder, capsys):
    assert main(["info", str(tiny_folder), "--layers"]) == 0
    said = capsys.readouterr().out
    assert "full precision: nothing in it is quantized" in said
    assert f"\n{tiny_folder.name}: full precision, " in said
    for word in ("unet", "UNet2DConditionModel", "vae", "AutoencoderKL", "parameters", "kernels", "compiled loops of onednn"):
        assert word in said


def test_info_as_json(tiny_folder, capsys):
    assert main(["info", str(tiny_folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantized"] is False and report["label"].startswith("full precision, ")
    components = {component["name"]: component for component in report["components"]}
    assert {"unet", "vae"} <= set(components) and components["unet"]["parameters"] > 1000


def test_info_says_what_the_kernels_keep_beside_the_weights(capsys, monkeypatch):
    """On a CPU at most a byte a weight, and the branch."""
    if BACKENDS["float"].unavailable():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.delenv("QARTSR_LOW_MEMORY", raising=False)

    def layers() -> list[dict]:
        assert main(["info", "tiny-w4a4", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        return [layer for component in report["components"] for layer in component["layers"]]

    monkeypatch.setenv("QARTSR_BACKEND", "float")
    for layer in layers():
        outputs, inputs, *kernel = layer["shape"]
        taps, rank = math.prod(kernel), layer["rank"]
        weights = outputs * inputs * taps if layer["weight_bits"] < 8 else 0
        branch = min(rank * (inputs + outputs * taps), inputs * outputs * taps) if rank else 0  # two factors, or their product
        assert layer["prepared_bytes"] == weights + 4 * (outputs + inputs) + 4 * branch
    monkeypatch.setenv("QARTSR_LOW_MEMORY", "1")
    assert not any(layer["prepared_bytes"] for layer in layers())
    assert main(["info", "tiny-w4a4"]) == 0 and "prepared:" not in capsys.readouterr().out


def test_a_description_leaves_the_model_as_it_was():
    model = QArtSRPipeline.from_pretrained("tiny-w2a2").vae
    report = describe_model("vae", model)
    assert all(layer.prepared.bytes == 0 for layer in model.modules() if isinstance(layer, DeployedLayer))
    keep_prepared(SimpleNamespace(components={"vae": model}), False)  # as when it is offloaded
    assert (report.prepared_bytes > 0) == any(layer.kernel != "reference" for layer in report.layers)
    assert describe_model("vae", model).prepared_bytes == 0


def test_help_and_usage_errors_wait_for_no_heavy_import():
    """Each command's module is light; what it imports when it runs is not counted."""
    code = (
        "import sys; from qartsr_pipeline.cli.main import COMMANDS, main\n"
        "for arguments in (['--help'], *([name, '--help'] for name in COMMANDS), ['info', '--no-such']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert end.code == (2 if '--no-such' in arguments else 0)\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"usage: qartsr {name}" in done.stdout for name in COMMANDS)
    labels = [f"  {name:<12}{label}\n" for name, label in shipped_labels().items()]
    assert (
        labels and done.stdout.count("shipped checkpoints:\n" + "".join(labels)) == 6
    )  # qartsr, upscale, info, bench, compare, demo


def test_info_of_a_folder_that_is_no_checkpoint(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "is not a checkpoint folder" in capsys.readouterr().err


def test_demo_writes_its_pictures_and_ends_with_the_line_of_numbers(tiny_folder, tmp_path, capsys, monkeypatch):
    folder, sample = tmp_path / "new" / "folder", tmp_path / "sample.png"
    with Image.open(demo.SAMPLE) as photograph:
        assert photograph.size == (512, 512)
        photograph.crop((100, 100, 228, 228)).save(sample)
    monkeypatch.setattr(demo, "SAMPLE", sample)
    monkeypatch.setattr(demo, "DETAIL", (0, 0, 32, 32))
    assert demo.run(folder, model=str(tiny_folder), full_precision=str(tiny_folder)) == 0
    *_, real, last = capsys.readouterr().out.splitlines()
    number = r"-?\d+\.\d\d"
    for line, start, picture in ((real, "demo real", "comparison_real.png"), (last, "demo", "comparison.png")):
        pattern = rf"{start}: psnr_y bicubic=({number}) full_precision={number} quantized={number} seconds={number} picture=(.+)"
        match = re.fullmatch(pattern, line)
        assert match and 15 < float(match[1]) < 40 and match[2] == str(folder / picture)
    sizes = {path.name: Image.open(path).size for path in folder.glob("*.png")}
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 2 and page.count("<li>") == 2 * 4  # bicubic, both models, the original
    assert sizes["input.png"] == sizes["input_real.png"] == (32, 32) and sizes["upscaled.png"] == (128, 128) and len(sizes) == 6
    clean, degraded = (np.asarray(Image.open(folder / name), float) for name in ("input.png", "input_real.png"))
    assert 2 < np.abs(clean - degraded).mean() < 30


def test_the_demo_compares_with_the_model_it_was_made_of(tiny_folder):
    assert demo._made_of("tiny-w2a2") == "tiny-fp" == demo._made_of(str(tiny_folder))


def test_comparison_holds_every_picture_and_its_detail():
    pictures = {"black": np.zeros((16, 16, 3), np.uint8), "white": np.full((16, 16, 3), 255, np.uint8)}
    pictures["black"][4:8, 4:8] = (200, 0, 0)
    sheet = comparison_sheet(pictures, detail=(4, 4, 8, 8))
    assert sheet.shape == (32 + 16 + 8 + 16, 16 + 8 + 16, 3)
    assert (sheet[32:48, 24:] == 255).all() and (sheet[56:, :16] == (200, 0, 0)).all()


def test_demo_reports_a_folder_it_cannot_write_to(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "-o", str(tmp_path / "file")]) == 2
    assert "is a file, not a folder" in capsys.readouterr().err


def _demo(model: str, folder, capsys) -> dict[str, float]:
    """The numbers of the demo's last line."""
    assert main(["demo", "-o", str(folder), "--model", model]) == 0
    return {name: float(value) for name, value in re.findall(r"(\w+)=(\d+\.\d+)", capsys.readouterr().out.splitlines()[-1])}


@pytest.mark.slow
def test_the_faithful_model_beats_bicubic(tmp_path, capsys):
    scores = _demo("tiny-w4a4", tmp_path, capsys)
    assert min(scores["full_precision"], scores["quantized"]) > scores["bicubic"] + 1


@pytest.mark.slow
def test_the_photograph_model_is_much_sharper_than_bicubic(tmp_path, capsys):
    """It is trained for how images look: PSNR, which rewards blur, may even be below bicubic's, but not by much."""
    scores = _demo("photo-w4a4", tmp_path, capsys)
    assert scores["quantized"] > scores["bicubic"] - 1
    original = read_image(demo.SAMPLE).pixels
    reduced = demo._bicubic(original, 1 / demo.SCALE)
    edges = {
        name: np.abs(np.diff(image.astype(float), axis=1)).mean()
        for name, image in {
            "original": original,
            "bicubic": demo._bicubic(reduced, demo.SCALE),
            "model": read_image(tmp_path / "upscaled.png").pixels,
        }.items()
    }
    assert 1.5 * edges["bicubic"] < edges["model"] < 1.15 * edges["original"]
