"""Main memory: how much this process may still take, and how much an enlargement needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from qartsr_pipeline.freed_memory import kept_memory

# Main memory that one enlargement takes, in bytes per pixel of the network's image or of the result, whichever has more pixels.
WORKING = 48  # four float32 RGB images at a time. With five of them, 50 to 60 were measured on an image of 31 megapixels
WITH_ALPHA = 16  # for an alpha channel, in addition
KEPT = 16  # for each finished result of a list, in bytes per pixel of that result
BANDS = 1 << 28  # bytes, in addition, for aligning the colours of large images, which is done band by band


class NotEnoughMemory(MemoryError):
    """An image is too large for the main memory that is free. Raised before the memory is taken."""


@dataclass(frozen=True)
class Enlargement:
    """One image of a call. Sizes are (height, width).

    Attributes:
        size: of the input image.
        working: its size at the network's own scale.
        result: size of the result, as asked for.
        alpha: whether an alpha channel is enlarged, too.
        decoded: False if only latents are wanted.
        network: bytes of main memory that a pass of the network takes at least; 0 on a GPU.
    """

    size: tuple[int, int]
    working: tuple[int, int]
    result: tuple[int, int]
    alpha: bool = False
    decoded: bool = True
    network: int = 0

    def images(self) -> int:
        """Bytes of whole images; they grow with the image's size."""
        working, result = (height * width for height, width in (self.working, self.result))
        pixels = max(working, result) if self.decoded else working // 2
        return pixels * (WORKING + WITH_ALPHA * self.alpha) + 16 * self.size[0] * self.size[1]

    def bytes(self) -> int:
        return self.images() + min(BANDS, self.images()) + self.network

    def kept(self) -> int:
        return KEPT * self.result[0] * self.result[1] if self.decoded else 0


def check_memory(enlargements: Sequence[Enlargement], free: int | None = None) -> None:
    """Checks that a call's images, one after the other, and all its results fit into main memory.

    Args:
        free: bytes; None for what `free_main_memory` says.

    Raises:
        NotEnoughMemory: they do not; the message says what would fit.
    """
    if not enlargements:
        return
    free = free_main_memory() if free is None else free
    largest = max(enlargements, key=Enlargement.bytes)
    others = sum(one.kept() for one in enlargements) - largest.kept()
    needed = largest.bytes() + others
    if needed <= free:
        return
    height, width = largest.size
    many = f" (with {len(enlargements) - 1} other images of the same call)" if others else ""
    message = (
        f"an image of {width} x {height} pixels enlarged to {largest.result[1]} x {largest.result[0]}{many} needs about"
        f" {needed / 1e9:.1f} GB of main memory, and {max(free, 0) / 1e9:.1f} GB are free."
    )
    if others and largest.bytes() <= free:
        raise NotEnoughMemory(f"{message} Enlarge fewer images at once.")
    share = (free - others - (largest.bytes() - largest.images())) / largest.images()
    fitting = [int(0.98 * side * max(share, 0) ** 0.5) for side in (width, height)]
    if not all(fitting):
        raise NotEnoughMemory(f"{message} Close other programs, or choose smaller tiles (`tile_size`, --tile-size).")
    raise NotEnoughMemory(
        f"{message} At most about {fitting[0]} x {fitting[1]} pixels would fit: reduce the image, or cut it into parts that"
        " overlap."
    )


def free_main_memory() -> int:
    """Bytes that this process can still take, by the machine and by the control groups (containers, batch jobs) it runs in."""
    limits = [psutil.virtual_memory().available, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min(limits) + kept_memory()


def _left_in_groups(membership: Path, root: Path) -> Iterator[int]:
    """What is left in each control group with a limit that this process is in, in both versions of Linux's interface.

    Pages of files that were read count as used, but are given up when memory is needed.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(base):
                left = _left_in(folder, *names)
                if left is not None:
                    yield left


def _left_in(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        counted = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root has no limit, and in a container the path may be that of the machine
        return None
    return None if most == "max" else int(most) - used + int(counted.get(reclaimable, 0))
