"""The documentation is true: its Python runs, its commands parse, its links lead somewhere, its numbers were measured."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from itertools import takewhile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from qartsr_pipeline.calibration import image_family, recipe_files
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.cli.main import COMMANDS
from qartsr_pipeline.cli.main import main as cli_main
from tiny_models import build_tiny_pipeline, build_tiny_video_pipeline

ROOT = Path(__file__).resolve().parent.parent
CARDS = sorted(ROOT.glob("qartsr_pipeline/checkpoints/*/README.md"))
GUIDES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))]
DOCUMENTS = [*GUIDES, *CARDS, *sorted(ROOT.glob("comfy_nodes/web/docs/*.md")), *sorted(ROOT.glob("benchmarks/results/*.md"))]
RUN = (
    "README.md",
    *(f"docs/{name}.md" for name in ("getting-started", "python", "video", "quantize-your-own-model", "evaluation")),
)
# The recipe of the examples, for a model with a few thousand weights: the same stages, smaller images and ranks.
SMALL = [
    "images=2",
    "image_size=64",
    "cached_batches=1",
    "layer.smoothing=ones",
    "layer.bounds=minmax",
    "layer.rounding=nearest",
    "layer.branch_rank=2",
    "budget={}",
    "layer.branch_fit=false",
    "layer.adapter_rank=2",
    *(f"stages.{stage}.{key}" for stage in (0, 1) for key in ("patch=32", "batch=1")),
    "stages.1.loss={image_l2: 1.0}",
]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory):
    """What the examples expect to find in the working folder; a random model of a few thousand weights stands in for tiny-fp."""
    folder = tmp_path_factory.mktemp("examples")
    build_tiny_pipeline(seed=0).save_pretrained(folder / "tiny-fp")
    build_tiny_video_pipeline(seed=0).save_pretrained(folder / "video-fp")
    for name, seed in {"photographs": 1, "other-photographs": 2}.items():
        (folder / name).mkdir()
        for index, image in enumerate(DeadLeaves().sample(2, 64, np.random.default_rng(seed))):
            pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    Image.fromarray(pixels[:24, :32]).save(folder / "photo.png")
    return folder


@pytest.fixture
def small_recipe_and_sample(example_folder, tmp_path, monkeypatch):
    """`qartsr` is the small form of itself, and the report is about a small image."""
    monkeypatch.setattr(image_family, "SAMPLE", example_folder / "other-photographs" / "0.png")
    folder = tmp_path / "recipes"
    folder.mkdir()
    small = recipe_files.with_values(recipe_files.load_recipe("qartsr"), SMALL)
    (folder / "qartsr.yaml").write_text(yaml.safe_dump(small.to_dict()), encoding="utf-8")
    monkeypatch.setattr(recipe_files, "RECIPES", folder)


def test_every_promise_names_tests_that_exist():
    """`folder/test_x.py::test_y`; `::test_y` alone is in the file named before it in the same line."""
    lines = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
    begins = [index + 2 for index, line in enumerate(lines) if line == "| promise | held by |"]
    rows = [row for begin in begins for row in takewhile(lambda line: line.startswith("| "), lines[begin:])]
    assert len(rows) > 30
    for promise, _, tests in (row.rpartition(" | ") for row in rows):
        named, file = [(path, test) for path, test in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", tests) if path or test], ""
        assert named, promise
        for path, test in named:
            file = path or file
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in text, f"{file}::{test}"


@pytest.mark.parametrize("document", RUN)
def test_the_python_of_a_document_runs(document, example_folder, small_recipe_and_sample, tmp_path, monkeypatch):
    folder = tmp_path / "work"
    shutil.copytree(example_folder, folder)
    monkeypatch.chdir(folder)
    code = blocks((ROOT / document).read_text(encoding="utf-8"), "python")
    assert code
    namespace: dict[str, object] = {"__name__": "example"}
    for block in code:
        exec(compile(re.sub(r"steps=\d+", "steps=2", block), document, "exec"), namespace)


@pytest.mark.parametrize("document", GUIDES, ids=name_of)
def test_what_examples_import_exists(document):
    for block in blocks(document.read_text(encoding="utf-8"), "python"):
        for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)$", block, re.M):
            for name in names.split(","):
                assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name.strip()}"


class Parsed(BaseException):
    """Raised in place of running a command whose arguments are valid."""


@pytest.fixture
def parse_only(monkeypatch):
    """Commands end once their own argument parser has accepted what they were given."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks, and in the lines of benchmarks.md that name one."""
    lines = [line for block in blocks(text, "sh") for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    for item in re.findall(r"^- Command: (.*(?:\n  .*)*)", text, re.M):
        lines += re.findall(r"`((?:qartsr|python) [^`]+)`", item.replace("\n  ", " "))
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_ours(words: list[str]) -> bool:
    return words[0] == "qartsr" or words[0] == "python" and words[1:3] != ["-m", "pip"] or words[:2] == ["accelerate", "launch"]


def run_ours(words: list[str], monkeypatch) -> None:
    """Runs a command of this repository within this process."""
    for index, word in enumerate(words):
        if word in ("qartsr", "-m") or re.fullmatch(r"(calibration|benchmarks)/\w+\.py", word):
            first = index + 2 if word == "-m" else index + 1
            monkeypatch.setattr(sys, "argv", [word, *words[first:]])
            if word == "-m":
                runpy.run_module(words[index + 1], run_name="__main__")
            elif word == "qartsr":
                cli_main()
            else:
                runpy.run_path(str(ROOT / word), run_name="__main__")
            return


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("document", [*GUIDES, *CARDS], ids=name_of)
def test_commands_parse(document, parse_only, monkeypatch):
    for words in commands(document.read_text(encoding="utf-8")):
        if is_ours(words):
            try:
                with pytest.raises(Parsed):
                    run_ours(words, monkeypatch)
            except SystemExit:
                pytest.fail(f"{' '.join(words)}: refused by its own parser")
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word]
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets), words
        else:
            assert words[0] in ("pip", "npm", "export"), f"{words[0]}: nothing checks this command"


def test_every_command_of_qartsr_is_documented():
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `qartsr (\w+)` \|", page, re.M)
    assert sorted(listed) == sorted(COMMANDS)
    assert {words[1] for words in commands(page) if words[0] == "qartsr"} <= set(COMMANDS)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(<?([^)>]+)>?\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


def test_the_index_lists_every_page():
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert [page.name for page in sorted(ROOT.glob("docs/*.md")) if f"({page.name})" not in index] == ["index.md"]


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def measured(data_set: str) -> dict[tuple[str, str | None], dict[str, float]]:
    """(model, colour alignment) -> metrics, from the raw results."""
    report = json.loads((ROOT / f"benchmarks/results/quality_{data_set}.json").read_text(encoding="utf-8"))
    return {(row["name"], row["color_fix"]): row for row in report["rows"] if row["kind"] in ("bicubic", "model")}


def quality(row: dict[str, float]) -> str:
    return f"{row['psnr_y']:.2f} / {row['ssim_y']:.4f}"


def table(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the rows of all tables; of rows with the same first cell, the first one counts."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in reversed(rows)}


def folder_size(model: str) -> str:
    """Of all files but the card."""
    files = [file for file in (ROOT / "qartsr_pipeline/checkpoints" / model).rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files if file.name not in ('README.md', 'sample.jpg')) / 1e6:.2f} MB"


@pytest.mark.parametrize("model", [card.parent.name for card in CARDS if card.parent.name.startswith("photo")])
def test_the_numbers_of_the_photograph_models_are_those_measured(model):
    results = json.loads((ROOT / "benchmarks/results/quality_photo_models.json").read_text(encoding="utf-8"))["rows"]
    reduced, degraded = ([f"{row[0]:.2f}", f"{row[1]:.4f}", f"{row[2]:.4f}"] for row in results[model].values())
    for path in (f"qartsr_pipeline/checkpoints/{model}/README.md", "docs/benchmarks.md"):
        assert table((ROOT / path).read_text(encoding="utf-8"))[model] == [folder_size(model), *reduced, *degraded], path
    row = table((ROOT / "README.md").read_text(encoding="utf-8"))[model]
    assert row[1:] == [folder_size(model), " / ".join(degraded[1:]), " / ".join(reduced[1:])]


@pytest.mark.parametrize("model", [card.parent.name for card in CARDS if card.parent.name.startswith("tiny")])
def test_the_numbers_of_the_models_are_those_measured(model):
    cid22, set5 = measured("cid22_val"), measured("set5")
    values = [quality(results[model, fix]) for results in (cid22, set5) for fix in ("wavelet", None)]
    card = table((ROOT / f"qartsr_pipeline/checkpoints/{model}/README.md").read_text(encoding="utf-8"))
    assert card[model] == [folder_size(model), *values]
    row = table((ROOT / "README.md").read_text(encoding="utf-8"))[model]
    share = cid22[model, "wavelet"].get("share_of_gain", 1.0)
    assert row[1:] == [card[model][0], values[0], f"{share:.0%}".replace("%", " %")]
    assert values[0] in table((ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"))[model]


@pytest.mark.parametrize("model", [card.parent.name for card in CARDS if card.parent.name.startswith("video")])
def test_the_numbers_of_the_video_models_are_those_measured(model):
    rows = {row["name"]: row for row in json.loads((ROOT / "benchmarks/results/quality_clips.json").read_text("utf-8"))["rows"]}
    row, gain = rows[model], rows["video-fp"]["psnr_y"] - rows["bicubic"]["psnr_y"]
    kept = "" if model == "video-fp" else f"{(row['psnr_y'] - rows['bicubic']['psnr_y']) / gain:.0%}".replace("%", " %")
    values = [folder_size(model), f"{row['psnr_y']:.2f}", f"{row['ssim_y']:.4f}", f"{row['temporal_error']:.3f}", kept]
    for path in (f"qartsr_pipeline/checkpoints/{model}/README.md", "docs/benchmarks.md"):
        assert table((ROOT / path).read_text(encoding="utf-8"))[model] == values, path
    readme = table((ROOT / "README.md").read_text(encoding="utf-8"))[model]
    assert readme[1:] == [values[0], f"{values[1]} / {values[2]}", kept or "100 %"]
