"""What was wrong with a clip while its frames were read, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass

from qartsr_pipeline.video_files.clip import Clip, frames_in_words


@dataclass
class Damage:
    """What was wrong with a file while its frames were read.

    Attributes:
        read: frames so far.
        packets: how many could not be decoded.
        frames: how many were decoded from damaged data.
        first: when the first damage was met, in seconds.
        end: why reading ended early.
        interlaced: frames that show two moments each.
        last, until: when the last frame begins and ends, in seconds.
        moved: frames whose time was not after that of the one before.
    """

    read: int = 0
    packets: int = 0
    frames: int = 0
    first: float | None = None
    end: str | None = None
    interlaced: int = 0
    moved: int = 0
    last: float = 0.0
    until: float = 0.0

    def at(self) -> None:
        """Notes when it was."""
        self.first = self.last if self.first is None else self.first

    def notices(self, clip: Clip) -> list[str]:
        """What the user should know, one sentence each."""
        said = []
        name = clip.path.name
        if self.packets or self.frames:
            many = f"{self.packets + self.frames} damaged places" if self.packets + self.frames > 1 else "a damaged place"
            said.append(
                f"{name} has {many}, the first at {clock(self.first or 0)}. Frames there are as the decoder "
                "repaired them, or missing."
            )
        expected = clip.frames if clip.is_exact else None
        if self.end:
            said.append(
                f"{name} breaks off after {frames_in_words(self.read)} ({self.end}). What could be read is written. For"
                " the rest, copy it again."
            )
        elif expected and self.read < expected:
            said.append(
                f"{name} should have {frames_in_words(expected)}, but {self.read} could be read and are written; the file may be"
                " cut off."
            )
        elif clip.seconds and self.read and not self.moved and self.until + 2 / clip.rate < clip.seconds:
            said.append(
                f"{name} says that it lasts {clock(clip.seconds)}, but its last frame is at {clock(self.last)}. All of "
                "its frames were written; the file may be cut off."
            )
        if self.moved:
            said.append(f"{name} gives no time for {frames_in_words(self.moved)}; each was put right after the one before.")
        return said


def clock(seconds: float) -> str:
    """1:02:03, or 2:03.5 below an hour."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{int(rest):02}" if hours else f"{minutes}:{rest:04.1f}"
