"""Are the weight files whole? Two tests: the layout of every safetensors file, and the SHA-256 sums in `checksums.json`.

The layout (8 bytes little-endian length, that many bytes of JSON, then the data) gives the size that a file must have, so a
truncated download is told apart from a damaged one without reading the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path, PurePosixPath

from qartsr_pipeline.checkpoint_files.errors import CheckpointError

CHECKSUMS_NAME = "checksums.json"
# The format's own limit; a larger number is no header length but some other file's first bytes.
_LARGEST_HEADER = 100_000_000
_RENEW = "Download the checkpoint again, or copy the folder again from where it came."


def check_safetensors(path: Path, label: str) -> None:
    """Raises CheckpointError unless the file at `path` has exactly the size that its own header asks for.

    Args:
        label: how the file is named in messages, for instance `unet/diffusion_pytorch_model.safetensors`.
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
        raise CheckpointError(
            f"{label} is damaged: its header is not what the safetensors format prescribes. {_RENEW}"
        ) from error


def write_checksums(folder: str | os.PathLike) -> Path:
    """Writes `checksums.json`, {relative path: SHA-256}, over every safetensors file below `folder`; returns its path.

    The file appears complete or not at all.
    """
    folder = Path(folder)
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*.safetensors"))}
    target = folder / CHECKSUMS_NAME
    temporary = folder / f".{CHECKSUMS_NAME}.{uuid.uuid4().hex[:8]}"
    try:
        temporary.write_text(json.dumps(sums, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def check_checksums(folder: Path) -> None:
    """Compares the files that `checksums.json` lists with their sums. A folder without that file passes unchecked."""
    listing = folder / CHECKSUMS_NAME
    if not listing.is_file():
        return
    for name, expected in _read_checksums(listing).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder} lacks {name}, which its {CHECKSUMS_NAME} lists. {_RENEW}")
        if _sha256(path) != expected:
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
