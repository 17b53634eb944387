"""Whether pictures to be measured are among those that a model was trained or calibrated on, by the content of the files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.data.fingerprint import data_fingerprint

RECORDS = ("quantization.json", "training.json")
BEFORE = "photographs_before"  # of a record: those of the models that this one was made from


def file_digests(paths: list[Path]) -> dict[str, str]:
    """Name -> SHA-256 of the file, sorted by name; where names repeat, the path below the common folder is the name."""
    paths = [Path(path) for path in paths]
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        common = os.path.commonpath([path.parent for path in paths])
        names = [path.relative_to(common).as_posix() for path in paths]
    return {name: _digest(path) for name, path in sorted(zip(names, paths, strict=True))}


def photographs_record(paths: list[Path]) -> dict[str, Any]:
    """What a record says of photographs: `data_fingerprint`, and "files", every one's own."""
    return data_fingerprint(paths) | {"files": file_digests(paths)}


def without_files(data: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the data, without the list of the photographs."""
    return {name: value for name, value in data.items() if name != "files"}


def overlap(paths: list[Path], recorded: dict[str, str]) -> list[Path]:
    """Those files whose content is among the recorded, whatever they are called.

    Args:
        recorded: name -> SHA-256, see `file_digests`.
    """
    digests = set(recorded.values())
    return [path for path in map(Path, paths) if _digest(path) in digests] if digests else []


def recorded_files(folder: str | Path) -> dict[str, str] | None:
    """Name -> SHA-256 of the photographs that the records of a pipeline folder list, as its own or as those of the models that it
    was made from; None if they list none.

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


def check_no_overlap(paths: list[Path], folder: str | Path) -> bool:
    """Whether the model in ``folder`` lists its photographs, after making sure that none of ``paths`` is one of them.

    Raises:
        ValueError: one is, or a record is not JSON.
    """
    recorded = recorded_files(folder)
    for path in overlap(paths, recorded or {}):
        digest = _digest(path)
        name = next(name for name, known in recorded.items() if known == digest)
        raise ValueError(
            f"{path} is one of the photographs that {Path(folder).name} was made with ({name}):"
            " measure on pictures that no model has seen"
        )
    return recorded is not None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
