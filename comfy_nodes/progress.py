"""While a node runs: the progress that ComfyUI shows below it, and its cancel button, also within a tile."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

LARGEST_PREVIEW = 4 << 20  # pixels; that of a larger result is reduced
LARGEST_FRAME = 768  # pixels of the longer side of a frame's preview, about
EVERY = 0.4  # seconds between previews, which take time of their own


class TileProgress:
    """Callback of the pipeline for one batch of images, which are enlarged one after another: shows a bar that counts
    tiles, and an image of what is finished so far. It has the result's size, because ComfyUI writes its size below it.

    Args:
        count: of images in the batch.
        size: (height, width) of the results.

    Attributes:
        tiles: of the last image: how many, and (height, width) of the largest, both without padding.
    """

    def __init__(self, count: int, size: tuple[int, int]):
        from comfy.utils import ProgressBar

        self.bar, self.count, self.index = ProgressBar(count), count, 0
        reduced = min(1.0, (LARGEST_PREVIEW / (size[0] * size[1])) ** 0.5)
        self.size = max(1, round(size[1] * reduced)), max(1, round(size[0] * reduced))
        self.canvas = PIL.Image.new("RGB", (1, 1))  # replaced by `start_image`
        self.shown = -math.inf
        self.tiles = (1, size)

    def start_image(self, index: int, image: torch.Tensor) -> None:
        """Begins the image of this number; `image`, (C, H, W) in [0, 1], is shown where nothing is finished yet."""
        self.index = index
        low = image[:3].expand(3, -1, -1)
        self.canvas = _to_pil(low).resize(self.size, PIL.Image.Resampling.BICUBIC)
        self.original_size = low.shape[-2:]

    def __call__(self, pipeline: Any, step: int, timestep: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Raises ComfyUI's InterruptProcessingException if the user has cancelled."""
        tile, grid = pipeline.current_tile
        height, width = (side * pipeline.config.scale for side in self.original_size)
        self.tiles = (len(grid), (min(grid.tile_height, height), min(grid.tile_width, width)))
        bottom, right = min(tile.top + tile.height, height), min(tile.left + tile.width, width)  # the rest is padding
        if bottom > tile.top and right > tile.left:
            across, down = self.canvas.width / width, self.canvas.height / height
            left, top = round(tile.left * across), round(tile.top * down)
            size = max(1, round(right * across) - left), max(1, round(bottom * down) - top)
            part = _to_pil(tensors["image"][0, :, : bottom - tile.top, : right - tile.left])
            self.canvas.paste(part.resize(size, PIL.Image.Resampling.BICUBIC), (left, top))
        done, steps = self.index * pipeline.num_timesteps + step + 1, self.count * pipeline.num_timesteps
        self.bar.update_absolute(done, steps, self._preview(last=done == steps))
        return tensors

    def _preview(self, last: bool) -> tuple[str, PIL.Image.Image, None] | None:
        """The canvas as ComfyUI takes it, with its own size (None), unless one was shown a moment ago."""
        now = time.monotonic()
        if not last and now - self.shown < EVERY:
            return None
        self.shown = now
        return ("JPEG", self.canvas.copy(), None)


class FrameProgress:
    """Shows a bar that counts the frames of a clip, and now and then the frame that was finished last.

    Args:
        count: how many there are, or about.

    Attributes:
        done: frames so far.
    """

    def __init__(self, count: int | None):
        from comfy.utils import ProgressBar

        self.count, self.done, self.shown = count or 1, 0, -math.inf
        self.bar = ProgressBar(self.count)

    def __call__(self, frame: np.ndarray) -> None:
        """Counts a frame, (H, W, 3) in [0, 1]. Raises ComfyUI's InterruptProcessingException if the user has cancelled."""
        self.done += 1
        now, preview = time.monotonic(), None
        if now - self.shown >= EVERY or self.done == self.count:
            self.shown, step = now, max(1, max(frame.shape[:2]) // LARGEST_FRAME)
            image = _to_pil(torch.from_numpy(frame[::step, ::step]).permute(2, 0, 1))
            preview = ("JPEG", image, None)
        self.bar.update_absolute(self.done, max(self.count, self.done), preview)


def _to_pil(image: torch.Tensor) -> PIL.Image.Image:
    """(3, H, W) in [0, 1] on any device -> RGB."""
    values = (image.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return PIL.Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())


@contextmanager
def interruptible(network: nn.Module) -> Iterator[None]:
    """While it is open, `network` raises ComfyUI's InterruptProcessingException at its next block once the user cancels.

    Single layers get no hook, because a layer with a hook is not fused with its neighbours.
    """
    from comfy.model_management import throw_exception_if_processing_interrupted

    def look(module: nn.Module, inputs: tuple) -> None:
        throw_exception_if_processing_interrupted()

    hooks = [module.register_forward_pre_hook(look) for module in network.modules() if any(module.children())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def interruptible_unless(busy: Callable[[], bool]) -> Iterator[None]:
    """The same for every network, including those that are built later, except while `busy` returns True."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    def look(module: nn.Module, inputs: tuple) -> None:
        if not busy():
            throw_exception_if_processing_interrupted()

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
