"""Reads files that others made in bounded time and memory, and compares their SHA-256 sums.

Nothing here trusts a file: what is not a regular file (a pipe would block for ever) is refused before it is opened, and JSON has
limits of size and depth. The sums are in the folder's `checksums.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from qartsr_pipeline.whole_files import write_whole

CHECKSUMS_NAME = "checksums.json"
RENEW = "Download the checkpoint again, or copy the folder again from its source."
_LARGEST_JSON = 16_000_000  # bytes; of files that are parsed here
_LARGEST_TABLE = 64_000_000  # of a tokenizer
_DEEPEST_JSON = 16  # nested lists and objects
# Path -> (size, modification time) and SHA-256 of the files that this process has read.
_known_sums: dict[Path, tuple[tuple[int, int], str]] = {}


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message says what was found, why that does not work, and the ways out."""


def check_readable(path: Path, label: str) -> os.stat_result:
    """Raises CheckpointError unless `path` is a regular file, or a link to one, that may be read; returns its status."""
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():  # the Hub's cache consists of links
            raise CheckpointError(
                f"{label} is a link that leads nowhere: a download was interrupted, or a cache was copied without the files that"
                f" it links to. {RENEW}"
            ) from error
        raise CheckpointError(f"{label} cannot be found ({error.strerror}). {RENEW}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{label} is {kind}, but a regular file belongs there. {RENEW}")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{label} may not be read by this user. Change its permissions, for instance with `chmod u+r`.")
    return status


def read_json(path: Path, label: str | None = None, remedy: str = RENEW) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        label: the file's name in messages; None for its path.
        remedy: the last sentence of a message.

    Raises:
        CheckpointError: not a regular file, too large, nested too deeply, not JSON, no object, or an object that has a key twice
            or a number that is not finite.
    """
    label = label or str(path)
    size = check_readable(path, label).st_size
    if size > _LARGEST_JSON:
        raise CheckpointError(
            f"{label} has {size:,} bytes, too many for a configuration (at most {_LARGEST_JSON:,}), so it was not read. {remedy}"
        )
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{label} is not valid JSON ({str(error)[:200]}). {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{label} holds no JSON object, but {type(content).__name__!r}. {remedy}")
    return content


def parse_json(text: bytes) -> Any:
    """What JSON in UTF-8 stands for; ValueError if it is none, ambiguous, not finite, or nested so deeply that readers fail."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_not_finite)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_DEEPEST_JSON} levels deep") from error
    level = [content]
    for _ in range(_DEEPEST_JSON):
        level = [value for each in level if isinstance(each, (dict, list)) for value in _values(each)]
    if level:
        raise ValueError(f"it is nested more than {_DEEPEST_JSON} levels deep")
    return content


def _values(container: dict | list) -> Any:
    return container.values() if isinstance(container, dict) else container


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} occurs twice in one object")
    return found


def _not_finite(constant: str) -> float:
    raise ValueError(f"{constant} is not a number that JSON knows")


def write_checksums(folder: str | os.PathLike) -> Path:
    """Writes `checksums.json`, {relative path: SHA-256}, for every file that loading `folder` reads; returns its path."""
    folder = Path(folder)
    sums = {path.relative_to(folder).as_posix(): _computed_sum(path) for path in sorted(_summed_files(folder))}
    target = folder / CHECKSUMS_NAME
    write_whole(target, (json.dumps(sums, indent=2) + "\n").encode())
    return target


def folder_sum(folder: Path) -> str:
    """A SHA-256 of every file that loading `folder` reads: two folders that have the same give the same results."""
    sums = {path.relative_to(folder).as_posix(): _known_sum(path) for path in sorted(_summed_files(folder))}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _summed_files(folder: Path) -> Iterator[Path]:
    """model_index.json, and the weights, configurations and tables in the components' folders."""
    patterns = ("model_index.json", *(f"[!.]*/[!.]*.{kind}" for kind in ("safetensors", "json", "txt")))
    return (path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


def check_checksums(folder: Path) -> None:
    """Raises CheckpointError unless the files that `checksums.json` lists have their sums; without that file nothing is checked.

    A file is read once in the life of a process, and again only if its size or modification time has changed.
    """
    listing = folder / CHECKSUMS_NAME
    if not os.path.lexists(listing):
        return
    for name, expected in _read_checksums(listing).items():
        path = folder / name
        if not os.path.lexists(path):
            raise CheckpointError(f"{folder} lacks {name}, which its {CHECKSUMS_NAME} lists. {RENEW}")
        status = check_readable(path, f"{name} in {folder}")
        if not name.endswith(".safetensors") and status.st_size > _LARGEST_TABLE:
            raise CheckpointError(f"{name} in {folder} was changed or damaged: it has {status.st_size:,} bytes. {RENEW}")
        if _known_sum(path) != expected:
            raise CheckpointError(
                f"{name} in {folder} was changed or damaged: its SHA-256 is not the one in {CHECKSUMS_NAME}. {RENEW}"
                f" If you changed it on purpose, remove its line from {CHECKSUMS_NAME}, or save the pipeline with"
                f" `save_pretrained`, which writes new sums."
            )


def _read_checksums(listing: Path) -> dict[str, str]:
    sums = read_json(listing, f"{listing}, without which nothing is compared,")
    for name, value in sums.items():
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not isinstance(value, str):
            raise CheckpointError(
                f"{listing} cannot be read: {name[:80]!r} is not the relative path of a file with its sum. {RENEW} Without this"
                f" file, nothing is compared."
            )
    return sums


def _known_sum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read only if this process has not read the file as it is now."""
    version, digest = _known_sums.get(path.resolve(), (None, ""))
    return digest if version == _version(path) else _computed_sum(path)


def _computed_sum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal, from its content; remembered for `_known_sum`.

    In text, a line's end counts as one character, because Git on Windows writes two.
    """
    version = _version(path)  # first: a change while the file is read makes the sum count as unknown
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            digest.update(file.read().replace(b"\r\n", b"\n"))
    _known_sums[path.resolve()] = version, digest.hexdigest()
    return digest.hexdigest()


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
