"""Which codecs and containers results are written in, and what each can hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qartsr_pipeline.video_files.clip import VideoFileError

_ALL_CHROMA = ("420", "422", "444")


@dataclass(frozen=True)
class Codec:
    """Attributes:
    encoder: FFmpeg's name.
    crf: what is used where none is given; None for lossless codecs, which take none.
    largest_crf: the worst quality.
    depths: bits a channel that it can hold.
    chroma: see `PixelKind`.
    even: whether sides must be even numbers where chroma has fewer samples.
    """

    encoder: str
    crf: int | None
    largest_crf: int
    depths: tuple[int, ...]
    chroma: tuple[str, ...]
    even: bool = True


CODECS = {
    "h264": Codec("libx264", 18, 51, (8, 10), _ALL_CHROMA),
    "hevc": Codec("libx265", 20, 51, (8, 10, 12), _ALL_CHROMA),
    "av1": Codec("libsvtav1", 24, 63, (8, 10), ("420",)),
    "ffv1": Codec("ffv1", None, 0, (8, 9, 10, 12, 14, 16), (*_ALL_CHROMA, "rgb"), even=False),
}
# The codecs that files of a suffix can hold, the default for 8 bits first.
CONTAINERS = {
    ".mp4": ("h264", "hevc", "av1"),
    ".m4v": ("h264", "hevc", "av1"),
    ".mov": ("h264", "hevc"),
    ".mkv": ("h264", "hevc", "av1", "ffv1"),
    ".webm": ("av1",),
    ".gif": (),
}


def check_codec(target: Path, codec: str | None, crf: float | None) -> None:
    """Raises VideoFileError when files of this name cannot hold the codec, or it takes no such quality."""
    suffix = target.suffix.lower()
    if suffix not in CONTAINERS:
        raise VideoFileError(f"{target} does not end in a format that clips are written in. Use one of {', '.join(CONTAINERS)}.")
    if suffix == ".gif":
        if codec is not None or crf is not None:
            raise VideoFileError(
                f"{target}: GIF has no codecs and no quality to choose. Leave out --codec and --crf, or write a .mp4."
            )
        return
    if codec is not None and codec not in CONTAINERS[suffix]:
        fitting = [name for name, codecs in CONTAINERS.items() if codec in codecs]
        raise VideoFileError(
            f"{target}: {suffix} files do not hold {codec}. Write {' or '.join(fitting)}, or choose "
            f"{' or '.join(CONTAINERS[suffix])}."
        )
    if crf is None:
        return
    largest = [CODECS[name].largest_crf for name in ([codec] if codec else CONTAINERS[suffix]) if CODECS[name].crf is not None]
    if not largest:
        raise VideoFileError(f"{codec} is lossless and takes no --crf. Leave it out, or choose h264, hevc or av1.")
    if not 0 <= crf <= min(largest):
        raise VideoFileError(f"--crf is {crf:g}, but goes from 0 (best) to {min(largest)}.")
