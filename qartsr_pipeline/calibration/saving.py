"""The files of a run: written whole or not at all, and tensors read back without executing anything that a file contains."""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError


class SavingError(OSError):
    """A file or folder of a run could not be written. The message says why and what is kept.

    A command that can continue a run adds how to do so.
    """


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes to a temporary name and renames: after a crash, or on a full disk, the file's old content is still there.

    Raises:
        SavingError: the disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = "The file that was saved before is untouched." if path.exists() else "Nothing was saved before."
        raise SavingError(
            f"{path} ({len(content) / 1e6:.0f} MB) cannot be written: {error.strerror or error}. {kept}"
            " Free some space or check the folder's permissions."
        ) from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Within, a name for a folder that is made and filled there; at the end it becomes ``target``, which does not exist yet.

    Raises:
        SavingError: the disk is full, or the parent folder cannot be written to; nothing is left then.
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except (SafetensorError, OSError) as error:  # the first is what safetensors makes of a full disk
        raise SavingError(f"{target} cannot be written ({error}). Free some space or check the folder's permissions.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of `torch.save`, as `write_whole` does. It is serialized in memory: PyTorch's writer hides why it failed."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def load_tensors(path: Path, what: str, device: str | torch.device = "cpu") -> Any:
    """Reads a file of `torch.save`; only tensors and plain values are unpickled.

    Args:
        what: the kind of file that is expected, for the message.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: it is missing, damaged or of another kind"
        raise ValueError(f"{path} cannot be read as {what} ({reason})") from error
