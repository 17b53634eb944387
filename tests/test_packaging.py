"""What is declared holds: the README's lines, the lower bounds, the package data."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qartsr_pipeline.checkpoint_files import fetch, shipped_checkpoints
from qartsr_pipeline.cli.demo import SAMPLE
from qartsr_pipeline.cli.main import COMMANDS, main, parse

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_local_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_readmes_python_is_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_the_readmes_commands_are_known(tmp_path, monkeypatch, capsys):
    """Each parses; what it then complains about is the picture or model that is not there."""
    monkeypatch.chdir(tmp_path)
    commands = [line.split("#")[0].split() for line in README.splitlines() if line.startswith("qartsr ")]
    assert {command[1] for command in commands} == set(COMMANDS)
    for command in commands:
        parse(command[1:])
        if command[1] == "upscale":
            assert main([*command[1:], "--model", "no/such/model"]) == 2
            assert "no/such/model" in capsys.readouterr().err


def test_minimum_requirements_are_exact_and_complete():
    script = [sys.executable, str(ROOT / "tools/minimum_requirements.py")]
    lines = subprocess.run([*script, "test"], capture_output=True, text=True, check=True).stdout.split()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)
    assert {"torch", "diffusers", "optimum-quanto", "pytest"} <= {line.split("==")[0] for line in lines}
    assert subprocess.run([*script, "nonsense"], capture_output=True).returncode != 0


def test_no_dependency_has_an_upper_bound():
    for requirement in importlib.metadata.requires("qartsr"):
        assert not re.search(r"<|~=|==(?!\s*['\"])", requirement.split(";")[0]), requirement


def test_the_sample_ships_with_its_credits():
    assert SAMPLE.is_file() and SAMPLE.stat().st_size < 500_000
    credits = (SAMPLE.parent / "CREDITS.md").read_text(encoding="utf-8")
    assert SAMPLE.name in credits and "CID22, Cloudinary" in credits and "CC BY-SA 4.0" in credits


@pytest.mark.parametrize("name", sorted(shipped_checkpoints()))
def test_shipped_checkpoints_are_found_by_name_and_whole(name):
    from qartsr_pipeline.checkpoint_files import check_checkpoint

    folder = fetch(name)
    check_checkpoint(folder)
    module, _ = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["prompt_embedding"]
    assert (folder / "prompt_embedding" / f"{module}.py").is_file(), "diffusers' generic class takes it from there"
