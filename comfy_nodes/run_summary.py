"""What QArtSR Upscale shows after a run: a line about it, and a reduced pair of images, before and after, for its slider."""

from __future__ import annotations

import threading
import uuid
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import psutil
import torch

from qartsr_pipeline.video_files.clip import frames_in_words

LONGEST = 1536  # side of the images of the pair
BACKDROP = 0.13  # behind transparent parts
KEPT = 200  # files of pairs; older ones are removed, so that a folder of images does not fill the disk
EVERY = 0.05  # seconds between looks at main memory

_pairs: deque[Path] = deque()


class PeakMemory:
    """Context manager that measures how much memory is taken while it is open: that of a CUDA device, else this process's.

    Attributes:
        bytes: the highest value; of main memory it is a sample every `EVERY` seconds.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0
        self._end = threading.Event()

    @property
    def kind(self) -> str:
        return "GPU memory" if self.device.type == "cuda" else "main memory"

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._end.set()
            self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, process.memory_info().rss)
            if self._end.wait(EVERY):
                return


@dataclass(frozen=True)
class Run:
    """A finished run. Sizes are (height, width).

    Attributes:
        decided_by: what gave the size, in words.
        tiles: how many each image had, and the size of the largest; None where the model was not used.
        kernels: of quantized layers, as `kernel_summary` says; "" if there are none.
        memory: the highest, and of what.
    """

    count: int
    size: tuple[int, int]
    result: tuple[int, int]
    decided_by: str
    seconds: float
    memory: tuple[int, str]
    tiles: tuple[int, tuple[int, int]] | None = None
    kernels: str = ""

    def line(self) -> str:
        """Such as "1024 x 768 from 256 x 192 (x4), 1 tile, 3.2 s, main memory at most 1.9 GB, kernels: 118 layers onednn"."""
        images = f"{self.count} images, " if self.count > 1 else ""
        parts = [f"{images}{_sides(self.result)} from {_sides(self.size)} ({self.decided_by})"]
        if self.tiles is None:
            parts.append("smaller than the image: resampled, the model was not used")
        elif self.tiles[0] > 1:
            parts.append(f"{self.tiles[0]} tiles of {_sides(self.tiles[1])}{' each' if self.count > 1 else ''}")
        else:
            parts.append("1 tile")
        parts += [f"{self.seconds:.1f} s", f"{self.memory[1]} at most {self.memory[0] / 1e9:.1f} GB"]
        if self.tiles is not None:
            parts.append(f"kernels: {self.kernels}" if self.kernels else "full precision")
        return ", ".join(parts)


@dataclass(frozen=True)
class ClipRun:
    """A finished run over the frames of a clip. Sizes are (height, width); the rest as in `Run`."""

    count: int
    size: tuple[int, int]
    result: tuple[int, int]
    seconds: float
    memory: tuple[int, str]
    kernels: str = ""

    def line(self) -> str:
        """Such as "96 frames, 1280 x 720 from 320 x 180, 48.0 s, 2.0 frames/s, main memory at most 1.9 GB, full precision"."""
        return ", ".join(
            [
                f"{frames_in_words(self.count)}, {_sides(self.result)} from {_sides(self.size)}",
                f"{self.seconds:.1f} s, {self.count / self.seconds:.2g} frames/s",
                f"{self.memory[1]} at most {self.memory[0] / 1e9:.1f} GB",
                f"kernels: {self.kernels}" if self.kernels else "full precision",
            ]
        )


def _sides(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


def save_pair(before: torch.Tensor, after: torch.Tensor, transparency: torch.Tensor) -> dict[str, str]:
    """Writes both as JPEG files of one size, reduced to `LONGEST`, into ComfyUI's temporary folder.

    Args:
        before: (C, h, w) in [0, 1], the image as it came. after: (H, W, 3), transparency: (H, W), the result.

    Returns:
        Names of the files below the temporary folder: "before" and "after".
    """
    import folder_paths

    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    height, width = after.shape[:2]
    share = min(1.0, LONGEST / max(height, width))
    size = max(1, round(width * share)), max(1, round(height * share))
    alpha = before[3] if len(before) == 4 else torch.ones(before.shape[1:])
    first = before[:3].expand(3, -1, -1).permute(1, 2, 0)
    images = {"before": (first, alpha), "after": (after, 1 - transparency)}
    stem, names = f"qartsr_{uuid.uuid4().hex[:12]}", {}
    for name, (image, opaque) in images.items():
        shown = image if bool((opaque == 1).all()) else image * opaque[..., None] + BACKDROP * (1 - opaque[..., None])
        pixels = PIL.Image.fromarray((shown.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy())
        names[name] = f"{stem}_{name}.jpg"
        pixels.resize(size, PIL.Image.Resampling.BICUBIC, reducing_gap=2.0).save(folder / names[name], quality=90)
        _pairs.append(folder / names[name])
    while len(_pairs) > KEPT:
        _pairs.popleft().unlink(missing_ok=True)
    return names
