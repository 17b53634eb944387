"""What records say of images and of the machine, and whether images to be measured were trained or calibrated on.

Photographs are recognized by the content of their files, not by name. For images in memory see `patches.images_record`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "numba", "Pillow")
RECORDS = ("quantization.json", "training.json")
BEFORE = "photographs_before"  # of a record: those of the models that this one was made from


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, those that are not installed left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """The CPU's name, as far as the system knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without a name there
        return platform.processor() or platform.machine()


def hardware(device: str = "cpu") -> str:
    """The name of the GPU, or of the CPU with the number of threads that PyTorch uses."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def data_fingerprint(paths: list[Path]) -> dict[str, int | str]:
    """``{"count": .., "sha256": ..}``: one SHA-256 over the lines "name, space, SHA-256 of the file", sorted by name."""
    digests = sorted((path.name, _digest(path)) for path in paths)
    lines = "".join(f"{name} {digest}\n" for name, digest in digests)
    return {"count": len(paths), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def file_digests(paths: Sequence[Path]) -> dict[str, str]:
    """Name -> SHA-256 of the file, sorted by name; where names repeat, the path below the common folder is the name."""
    paths = [Path(path) for path in paths]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(common).as_posix() for path in paths]
    return {name: _digest(path) for name, path in sorted(zip(names, paths, strict=True))}


def photographs_record(paths: list[Path]) -> dict[str, Any]:
    """What a record says of photographs: `data_fingerprint`, and "files" with the hash of each file."""
    return data_fingerprint(paths) | {"files": file_digests(paths)}


def without_files(data: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the data, without the lists of files."""
    return {name: value for name, value in data.items() if name not in ("files", "too_short")}


def overlap(paths: Sequence[Path], recorded: dict[str, str]) -> list[Path]:
    """The files whose content is among the recorded ones, whatever they are called.

    Args:
        recorded: name -> SHA-256, see `file_digests`.
    """
    digests = set(recorded.values())
    return [path for path in map(Path, paths) if _digest(path) in digests] if digests else []


def recorded_files(folder: str | Path) -> dict[str, str] | None:
    """Name -> SHA-256 of the photographs that a folder's records list, for its model and the models it was made from.

    Returns None if no record lists any.

    Raises:
        ValueError: a record is not JSON.
    """
    files: dict[str, str] = {}
    for path in (Path(folder) / name for name in RECORDS):
        if path.is_file():
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                data, before = record.get("data"), record.get(BEFORE) or {}
            except (ValueError, AttributeError) as error:
                raise ValueError(
                    f"{path} cannot be read as a record ({error}): restore it from where the model is from"
                ) from error
            listed = data.get("files") if isinstance(data, dict) else None
            files |= {f"{path.name}: {name}": digest for name, digest in {**before, **(listed or {})}.items()}
    return files or None


def check_no_overlap(paths: Sequence[Path], folder: str | Path) -> bool:
    """Whether the model in ``folder`` lists its photographs, after making sure that none of ``paths`` is one of them.

    Raises:
        ValueError: one is, or a record is not JSON.
    """
    recorded = recorded_files(folder)
    if recorded is None:
        return False
    for path in overlap(paths, recorded):
        digest = _digest(path)
        name = next(name for name, known in recorded.items() if known == digest)
        raise ValueError(
            f"{path} is one of the photographs that {Path(folder).name} was made with ({name}):"
            " measure on images that no model has seen"
        )
    return True


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # clips may be larger than memory
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
