"""Is everything here that the nodes need? And how they find qartsr_pipeline, which need not be installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository, also when this folder is linked somewhere else
REQUIREMENTS = ROOT / "requirements.txt"
OWN_PACKAGES = ("qartsr_pipeline", "calibration")
CALIBRATION = ("pyyaml>=6.0.1", "matplotlib>=3.9.0", "scikit-image>=0.24.0")  # the extra of pyproject.toml, for QArtSR Quantize


def what_is_missing() -> str | None:
    """One line that names what is missing or too old and the command that installs it; None if nothing is."""
    if not REQUIREMENTS.is_file():  # this folder alone was copied
        if importlib.util.find_spec("qartsr_pipeline"):
            return None
        return f"the package qartsr is missing. Run: {sys.executable} -m pip install qartsr"
    lacking = _lacking(REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    if not lacking:
        return None
    return f'{", ".join(lacking.values())}. Run: "{sys.executable}" -m pip install -r "{REQUIREMENTS}"'


def what_calibration_lacks() -> str | None:
    """The same for what only the calibration of new checkpoints needs."""
    if not importlib.util.find_spec("calibration"):
        return "the folder calibration is missing. Clone the whole repository into custom_nodes, and start ComfyUI again."
    lacking = _lacking(CALIBRATION)
    if not lacking:
        return None
    needed = " ".join(f'"{requirement}"' for requirement in lacking)
    return f'{", ".join(lacking.values())}. Run: "{sys.executable}" -m pip install {needed}'


def _lacking(requirements: Iterable[str]) -> dict[str, str]:
    """Requirement -> what is wrong, for lines NAME>=VERSION that this environment does not meet."""
    lacking = {}
    for line in requirements:
        requirement = line.split("#")[0].strip()
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement)
        if match and (problem := _problem(*match.groups())):
            lacking[requirement] = problem
    return lacking


def _problem(name: str, bound: str) -> str | None:
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is missing"
    return f"{name} {found} is older than {bound}" if _numbers(found) < _numbers(bound) else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.match(r"[\d.]*", version).group().split(".") if number]


def install_own_packages() -> None:
    """Makes this repository's packages importable under their own names, as saved checkpoints and absolute imports need.

    `sys.path` stays as it is, so that folders such as tests/ do not become visible to other nodes. Packages imported already are
    kept: there is one of each.
    """
    for name in OWN_PACKAGES:
        path = ROOT / name / "__init__.py"
        if (
            name not in sys.modules
            and path.is_file()
            and not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path)
        ):
            sys.meta_path.insert(0, _Finder(name, path))


class _Finder:
    """Finds one package of this repository, and nothing else; it is not imported before somebody does."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path

    def find_spec(self, name: str, path: object = None, target: object = None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, submodule_search_locations=[str(self.path.parent)])
