"""What a run over many pictures shows: a bar over files, and lines that do not tear it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

    from qartsr_pipeline.cli.jobs import Job
    from qartsr_pipeline.cli.processes import Processes


@dataclass
class Counts:
    """What became of pictures."""

    written: int = 0
    skipped: int = 0
    failed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.written + other.written, self.skipped + other.skipped, self.failed + other.failed)

    def __str__(self) -> str:
        """`5 pictures: 3 written, 1 skipped, 1 failed`; what was skipped is left out where nothing was."""
        parts = [f"{self.written} written", *([f"{self.skipped} skipped"] if self.skipped else []), f"{self.failed} failed"]
        return f"{self.written + self.skipped + self.failed} pictures: {', '.join(parts)}"


@contextmanager
def picture_bar(jobs: Sequence[Job], processes: Processes) -> Iterator[tqdm]:
    """A bar on stderr over this process's pictures: if there are several, a person watches, and no other process here has one."""
    from tqdm import tqdm

    shown = len(jobs) > 1 and processes.is_local_main
    title = "pictures" if processes.count == 1 else f"pictures of process {processes.index + 1} of {processes.count}"
    with tqdm(total=len(jobs), desc=title, unit="picture", disable=None if shown else True) as bar:
        yield bar


def say(line: str, error: bool = False) -> None:
    """Prints a line, above the bars if there are any."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr if error else sys.stdout)
    (sys.stderr if error else sys.stdout).flush()
