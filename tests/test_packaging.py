"""What pyproject.toml declares holds: lower bounds only, the package data, and a wheel that works without a checkout."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from qartsr_pipeline.checkpoint_files import check_checkpoint, fetch, shipped_checkpoints, shipped_labels
from qartsr_pipeline.cli.demo import SAMPLE

ROOT = Path(__file__).resolve().parent.parent
MODELS = {"tiny-fp": "full precision", "tiny-w8a8": "8 bits", "tiny-w4a4": "4 bits", "tiny-w3a3": "3 bits", "tiny-w2a2": "2 bits"}
MODELS |= {name.replace("tiny", "photo"): bits for name, bits in MODELS.items() if name != "tiny-w3a3"}
MODELS |= {"video-fp": "full precision", "video-w4a4": "4 bits"}

PURPOSES = {"tiny": "clean images", "photo": "real photographs", "video": "clean clips"}


def test_minimum_requirements_are_exact_and_complete():
    script = [sys.executable, str(ROOT / "tools/minimum_requirements.py")]
    lines = subprocess.run([*script, "test"], capture_output=True, text=True, check=True).stdout.split()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    assert {"torch", "diffusers", "optimum-quanto", "pyyaml", "pytest"} <= {line.split("==")[0] for line in lines}
    refused = subprocess.run([*script, "nonsense"], capture_output=True, text=True)
    assert refused.returncode != 0 and "no extra ['nonsense']" in refused.stderr


def test_no_dependency_has_an_upper_bound():
    for requirement in importlib.metadata.requires("qartsr"):
        assert not re.search(r"<|~=|==(?!\s*['\"])", requirement.split(";")[0]), requirement


def test_documented_extras_exist():
    page = (ROOT / "docs/getting-started.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \|", page, re.M)
    script = [sys.executable, str(ROOT / "tools/minimum_requirements.py"), *documented]  # refuses an extra that does not exist
    assert documented and subprocess.run(script, capture_output=True).returncode == 0


def test_the_sample_ships_with_its_credits():
    assert SAMPLE.is_file() and SAMPLE.stat().st_size < 500_000
    credits = (SAMPLE.parent / "CREDITS.md").read_text(encoding="utf-8")
    assert SAMPLE.name in credits and "CID22, Cloudinary" in credits and "CC BY-SA 4.0" in credits


@pytest.mark.parametrize("name", sorted(MODELS))
def test_shipped_checkpoints_are_found_by_name_and_complete(name):
    folder = fetch(name)
    assert name in shipped_checkpoints()
    check_checkpoint(folder)
    purpose, bits, size = shipped_labels()[name].split(", ")
    assert purpose == PURPOSES[name.partition("-")[0]] and bits == MODELS[name] and re.fullmatch(r"\d+ MB", size)
    module, _ = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["prompt_embedding"]
    assert (folder / "prompt_embedding" / f"{module}.py").is_file(), "diffusers' generic class takes it from there"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, unpacked: what `pip install` puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (built,) = folder.glob("*.whl")
    zipfile.ZipFile(built).extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.mark.slow
def test_the_wheel_has_the_package_and_its_data(wheel):
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"qartsr_pipeline"}
    package = wheel / "qartsr_pipeline"
    assert {path.name for path in (package / "checkpoints").iterdir()} == set(MODELS)
    recipes = {path.name for path in (ROOT / "qartsr_pipeline/calibration/recipes").iterdir() if path.suffix == ".yaml"}
    assert {path.name for path in (package / "calibration/recipes").glob("*.yaml")} == recipes
    assert (package / "samples" / SAMPLE.name).is_file()
    assert {path.suffix for path in (package / "image").glob("comparison_page.*")} == {".py", ".css", ".js"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["demo"], "demo_output/comparison.png"),
        (["quantize", "tiny-fp", "--recipe", "maxmin", "--bits", "w8a8", "--output", "run"], "run/model/model_index.json"),
        (["evaluate", "tiny-fp", "tiny-w2a2", "--data", "photographs", "--output", "report.json"], "report.json"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_work_without_a_checkout(wheel, command, expected, tmp_path):
    from PIL import Image

    (tmp_path / "photographs").mkdir()
    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 30).save(tmp_path / "photographs" / "image.png")
    origin = "import qartsr_pipeline, sys; print(qartsr_pipeline.__file__)"
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    assert str(wheel) in subprocess.run([sys.executable, "-c", origin], check=True, **run).stdout
    done = subprocess.run([sys.executable, "-m", "qartsr_pipeline.cli", *command], **run)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / expected).is_file()
