"""The files of a run: written whole or not at all, and tensors read back without executing anything that a file contains."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from qartsr_pipeline.whole_files import SavingError, make_folder, remedy, temporary_folder, write_whole


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Within, a name for a folder that is made and filled there; at the end it becomes ``target``, which does not exist yet.

    Raises:
        SavingError: the disk is full, or the parent folder cannot be written to; nothing is left then.
    """
    temporary = temporary_folder(target)
    try:
        make_folder(target.parent)
        yield temporary
        os.replace(temporary, target)
    except (SafetensorError, OSError) as error:  # the first is what safetensors makes of a full disk
        raise SavingError(f"{target} cannot be written ({error}). {remedy(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of `torch.save`, as `write_whole` does. It is serialized in memory: PyTorch's writer hides why it failed."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def load_tensors(path: Path, what: str, way_out: str, device: str | torch.device = "cpu") -> Any:
    """Reads a file of `torch.save`; only tensors and plain values are unpickled, and what the disk damaged is noticed.

    Args:
        what: the kind of file that is expected, for the message.
        way_out: what to do if it is another one, for the message.

    Raises:
        ValueError: the file is missing, damaged or of another kind.
    """
    try:
        if zipfile.is_zipfile(path):  # files of old versions of PyTorch are not
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch.load does not compare the checksums
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        why = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
        reason = f"{type(error).__name__}{why}: it is missing, damaged or of another kind"
        raise ValueError(f"{path} cannot be read as {what} ({reason}): {way_out}") from error
