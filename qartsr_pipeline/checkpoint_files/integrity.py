"""Checks that weight files are complete and undamaged, by two tests: their safetensors layout, and their SHA-256 sums.

The layout (8 bytes of length in little-endian order, a JSON header of that length, then the data) gives the size that a file must
have, so a truncated file is recognized without reading its weights. The sums are in the folder's `checksums.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path, PurePosixPath

CHECKSUMS_NAME = "checksums.json"
# The format's own limit. A larger number is not the length of a header, so the file is of another format.
_LARGEST_HEADER = 100_000_000
_RENEW = "Download the checkpoint again, or copy the folder again from its source."
# Path -> (size, modification time) and SHA-256 of the files that this process has read.
_known_sums: dict[Path, tuple[tuple[int, int], str]] = {}


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what was found, why that does not work, and the ways out."""


def check_safetensors(path: Path, label: str) -> None:
    """Raises CheckpointError unless the file at `path` has exactly the size that its own header asks for.

    Args:
        label: the file's name in messages, for instance `unet/diffusion_pytorch_model.safetensors`.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= _LARGEST_HEADER:
            raise CheckpointError(f"{label} is not a safetensors file ({size} bytes, no header at its start). {_RENEW}")
        header_bytes = file.read(length)
    if len(header_bytes) < length:
        raise CheckpointError(f"{label} is truncated: it ends within its header, after {size} bytes. {_RENEW}")
    expected = 8 + length + _data_size(header_bytes, label)
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{label} is {state}: it has {size} bytes, its header describes {expected}. {_RENEW}")


def _data_size(header_bytes: bytes, label: str) -> int:
    try:
        header = json.loads(header_bytes)
        return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{label} is damaged: its header is not valid in the safetensors format. {_RENEW}") from error


def write_checksums(folder: str | os.PathLike) -> Path:
    """Writes `checksums.json`, {relative path: SHA-256}, for every safetensors file below `folder`; returns its path.

    It is written under a temporary name and renamed, so a file that exists is complete.
    """
    folder = Path(folder)
    sums = {path.relative_to(folder).as_posix(): _computed_sum(path) for path in sorted(folder.rglob("*.safetensors"))}
    target = folder / CHECKSUMS_NAME
    temporary = folder / f".{CHECKSUMS_NAME}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def check_checksums(folder: Path) -> None:
    """Raises CheckpointError unless the files that `checksums.json` lists have their sums; without that file nothing is checked.

    A file is read once in the life of a process, and again only if its size or modification time has changed.
    """
    listing = folder / CHECKSUMS_NAME
    if not listing.is_file():
        return
    for name, expected in _read_checksums(listing).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {CHECKSUMS_NAME} lists. {_RENEW}")
        if _known_sum(path) != expected:
            raise CheckpointError(
                f"{name} in {folder} was changed or damaged: its SHA-256 is not the one in {CHECKSUMS_NAME}. {_RENEW}"
                f" If you changed the weights on purpose, save them with `save_pretrained`, which writes new sums."
            )


def _read_checksums(listing: Path) -> dict[str, str]:
    try:
        sums = json.loads(listing.read_text(encoding="utf-8"))
        safe = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in sums)
        if not safe or not all(isinstance(value, str) for value in sums.values()):
            raise ValueError("not a table of relative paths and sums")
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{listing} cannot be read ({error}). {_RENEW} Without the file, nothing is compared.") from error
    return sums


def _known_sum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read only if this process has not read the file as it is now."""
    version, digest = _known_sums.get(path.resolve(), (None, ""))
    return digest if version == _version(path) else _computed_sum(path)


def _computed_sum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, from its content; remembered for `_known_sum`."""
    version = _version(path)  # first: a change while the file is read makes the sum count as unknown
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    _known_sums[path.resolve()] = version, digest.hexdigest()
    return digest.hexdigest()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
