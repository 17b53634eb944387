"""Training that can be stopped: state files that appear whole or not at all, and Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch

STATE_NAME = "state.pt"
ENTRIES = {"model", "average", "phase_index", "step", "history", "phases"}


class SavingError(OSError):
    """A file of the run could not be written; what was saved before is untouched."""


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file through a temporary one: after a crash or on a full disk the old content is still there.

    Raises:
        SavingError: with the reason.
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
        kept = "The one saved before is untouched." if path.exists() else "Nothing was saved before."
        raise SavingError(
            f"{path} ({len(content) / 1e6:.0f} MB) cannot be written: {error.strerror or error}. {kept}"
            " Make room or mend the folder, then continue with --resume."
        ) from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes a training state. It is serialized in memory: PyTorch's own writer hides why it failed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def load_tensors(path: Path, what: str, device: str = "cpu") -> Any:
    """Reads a file of `torch.save`; only tensors and plain values are unpickled.

    Args:
        what: it should be, for the message.

    Raises:
        ValueError: missing, damaged or of another kind.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: it is missing, damaged or of another kind"
        raise ValueError(f"{path} cannot be read as {what} ({reason})") from error


def load_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Reads a training state; only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError: none there. ValueError: damaged, or not a state of calibration/teacher/train.py.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no training state {str(path)!r}; a run of calibration/teacher/train.py writes one to its --output"
        )
    state = load_tensors(path, "a training state", device)
    missing = ENTRIES - state.keys() if isinstance(state, dict) else ENTRIES
    if missing:
        raise ValueError(f"{path} is no state of calibration/teacher/train.py: it lacks the entries {', '.join(sorted(missing))}")
    return state


class StopSignals:
    """Inside, Ctrl-C and the termination signal only set `requested`; a second one interrupts at once."""

    def __init__(self):
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
