"""What a command prints: errors in one line each, and lines that do not break the progress bars."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

from qartsr_pipeline.cli.processes import Processes
from qartsr_pipeline.memory import NotEnoughMemory


class UsageError(ValueError):
    """The arguments of the command make no sense together, or name something that is not there."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. The allocators of CPUs and of Apple's and NVIDIA's GPUs raise a RuntimeError that says so."""
    phrases = ("defaultcpuallocator", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(phrase in str(error).lower() for phrase in phrases)


def one_line(error: BaseException) -> str:
    """The error in one line. An unexpected one is preceded by its class and followed by how to see its traceback."""
    text = " ".join(str(error).split())
    if isinstance(error, NotEnoughMemory):
        return text
    if is_out_of_memory(error):
        return f"out of memory ({text or type(error).__name__}). Try a smaller --tile-size, such as 256, or --device cpu."
    if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)) and text:
        return text
    return f"{type(error).__name__}: {text} (unexpected: --debug shows the traceback)"


def say(line: str, error: bool = False) -> None:
    """Prints a line, above the progress bars if there are any. What the stream cannot show becomes a code such as ``\\xe9``, and
    so do control characters, which names of files may have.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None or stream.closed:  # as in programs without a console
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    line = "".join(one if unicodedata.category(one) != "Cc" else f"\\x{ord(one):02x}" for one in line)
    tqdm.write(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)
    stream.flush()


@dataclass
class Counts:
    """How many images, or clips, were written, skipped because their output existed, and failed, and why they failed."""

    written: int = 0
    skipped: int = 0
    failed: int = 0
    failures: tuple[str, ...] = ()
    what: str = "images"

    def __add__(self, other: Counts) -> Counts:
        failures = self.failures + other.failures
        return Counts(self.written + other.written, self.skipped + other.skipped, self.failed + other.failed, failures, self.what)

    def add_failure(self, message: str) -> None:
        """Counts an image that could not be enlarged."""
        self.failed, self.failures = self.failed + 1, (*self.failures, message)

    def summary(self) -> list[str]:
        """The counts, why images were skipped, and every failure once more: it may have scrolled out of sight."""
        skipped = ["skipped: what existed already (--overwrite redoes it)"] if self.skipped else []
        return [str(self), *skipped, *(f"failed: {message}" for message in self.failures)]

    def __str__(self) -> str:
        """`5 images: 3 written, 1 skipped, 1 failed`; skipped images are mentioned only where there are any."""
        parts = [f"{self.written} written", *([f"{self.skipped} skipped"] if self.skipped else []), f"{self.failed} failed"]
        return f"{self.written + self.skipped + self.failed} {self.what}: {', '.join(parts)}"


@contextmanager
def image_bar(count: int, processes: Processes) -> Iterator[tqdm]:
    """A progress bar on stderr over the images of this process. Shown for several images, on a terminal, once a machine."""
    shown = count > 1 and processes.is_local_main
    title = "images" if processes.count == 1 else f"images of process {processes.index + 1} of {processes.count}"
    with tqdm(total=count, desc=title, unit="image", disable=None if shown else True) as bar:
        yield bar
