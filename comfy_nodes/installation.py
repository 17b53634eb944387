"""Checks that the packages that the nodes need are installed, and imports qartsr_pipeline, which need not be."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository, also when this folder is linked somewhere else
REQUIREMENTS = Path(__file__).resolve().parent / "requirements.txt"
PACKAGE = "qartsr_pipeline"


def what_is_missing() -> str | None:
    """One line that names what is missing or too old and the command that installs it; None if nothing is."""
    if not (ROOT / PACKAGE).is_dir() and importlib.util.find_spec(PACKAGE) is None:  # this folder alone was copied
        return f"the package qartsr is missing. Run: {sys.executable} -m pip install qartsr"
    found = []
    for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"([\w.-]+)>=([\d.]+)", line.split("#")[0].strip())
        if match and (problem := problem_of(*match.groups())):
            found.append(problem)
    return f'{", ".join(found)}. Run: "{sys.executable}" -m pip install -r "{REQUIREMENTS}"' if found else None


def problem_of(name: str, bound: str) -> str | None:
    """What is wrong if this environment does not have release `bound` or a later one of a package; None if it has."""
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"{name} is missing"
    return f"{name} {found} is older than {bound}" if _numbers(found) < _numbers(bound) else None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.sub(r"[^\d.].*", "", version).split(".") if number]


def copy_samples() -> None:
    """Copies what the example workflows load into ComfyUI's input folder, each once: what is deleted there stays away."""
    import folder_paths

    sources = [folder / "example_workflows" / "inputs" for folder in (Path(__file__).parent, ROOT)]
    source = next((folder for folder in sources if folder.is_dir()), None)
    try:
        done = Path(folder_paths.get_user_directory()) / "qartsr_samples_copied"
        if source is None:
            return
        samples = {path.relative_to(source).as_posix(): path for kind in ("*.png", "*.mp4") for path in source.rglob(kind)}
        copied = set(done.read_text(encoding="utf-8").splitlines()) if done.exists() else None
        if copied == set():  # by a version with images alone, which did not note their names
            copied = {name for name in samples if name.endswith(".png")}
        if copied is not None and copied >= samples.keys():
            return
        target = Path(folder_paths.get_input_directory())
        for name in samples.keys() - (copied or set()):
            if not (target / name).exists():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(samples[name], target / name)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.write_text("\n".join(sorted(samples)), encoding="utf-8")
    except OSError as error:  # a read-only folder is no reason to do without the nodes
        logging.warning("QArtSR: the samples of the example workflows are not copied to ComfyUI's input folder: %s", error)


def import_own_package() -> None:
    """Imports qartsr_pipeline from this repository, if it is there and none has been imported yet.

    So a clone in custom_nodes/ needs no installation. `sys.path` stays as it is, so that folders such as tests/ do not become
    visible to other nodes.
    """
    path = ROOT / PACKAGE / "__init__.py"
    if PACKAGE in sys.modules or not path.is_file():
        return
    spec = importlib.util.spec_from_file_location(PACKAGE, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[PACKAGE]
        raise
