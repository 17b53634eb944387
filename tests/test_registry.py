"""What is published to ComfyUI's registry: its fields, its icon, and code that the registry's checks let pass."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ("__init__.py", "comfy_nodes", "qartsr_pipeline")  # the code; see .comfyignore


@pytest.fixture(scope="module")
def registry():
    spec = importlib.util.spec_from_file_location("registry", ROOT / "tools" / "registry.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(registry, version="0.2.0", tag="v0.2.0", publisher="the-publisher"):
    text = re.sub(r'^version = ".*"', f'version = "{version}"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.M)
    return registry.tomllib.loads(registry.filled(text, "https://github.com/owner/QArtSR.git", tag, publisher))


def test_the_fields_are_complete_once_publisher_and_repository_are_known(registry):
    pyproject = filled(registry)
    assert registry.problems(pyproject, "v0.2.0") == []
    icon = "https://raw.githubusercontent.com/owner/QArtSR/v0.2.0/comfy_nodes/web/icon.svg"
    assert pyproject["tool"]["comfy"]["Icon"] == icon
    assert pyproject["project"]["urls"]["Repository"] == "https://github.com/owner/QArtSR"
    assert not any("comfyui-frontend-package" in line for line in pyproject["project"]["dependencies"])


def test_what_the_registry_would_refuse_is_named(registry):
    found = registry.problems(filled(registry, version="0.2.0.dev0", publisher=""), "v0.2.0")
    assert ["project.version" in found[0], "the tag v0.2.0" in found[1], "publisher's id ''" in found[2]] == [True] * 3


def test_the_icon_is_a_square_of_at_most_400_pixels(registry):
    icon = ElementTree.parse(ROOT / registry.ICON).getroot()
    assert icon.tag.endswith("svg") and icon.get("width") == icon.get("height") == "400"


def test_code_has_none_of_the_patterns_that_the_registry_refuses():
    """eval and exec, several statements in a line, and packages installed by the nodes themselves."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--quiet", "--select", "S102,S307,E702", *PUBLISHED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "comfy_nodes").glob("*.py"):
        assert not re.search(r"\bsubprocess\b|\bos\.system\b|\bpip\._internal\b", path.read_text(encoding="utf-8")), path


def test_what_is_left_out_is_not_needed(registry):
    left_out = [line.strip("/") for line in (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines() if line[0] == "/"]
    assert left_out and all((ROOT / name).is_dir() for name in left_out)
    assert not {"comfy_nodes", "qartsr_pipeline", "example_workflows"} & set(left_out)
