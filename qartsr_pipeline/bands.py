"""Enlarges an image from top to bottom, for results that do not fit into main memory as floats.

A call of the pipeline holds four images of the result's size, 48 bytes a pixel. Here only the rows that one row of tiles covers
are computed at a time: the bicubic enlargement, the tiles blended, colours aligned (which needs 31 rows above and below). Results
are those of a call with the same tiles. It works at the network's own scale, and with colour alignment that looks at the
neighbourhood of a pixel, not at the whole image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from qartsr_pipeline.calls import alone_where_needed
from qartsr_pipeline.image.color_alignment import WAVELET_LEVELS, align_color
from qartsr_pipeline.image.conversion import ImageTensors, to_grey, to_images, to_numpy
from qartsr_pipeline.image.resize import PaddedEnlargement, enlarge_alpha, enlarged_size, fill_transparent
from qartsr_pipeline.image.tiles import SURE_SHARE, TILE_SIZES, Tile, TilePlan, axis_weights, choose_tile_size, free_memory
from qartsr_pipeline.memory import NotEnoughMemory, free_main_memory
from qartsr_pipeline.one_step import OneStepNetwork, Settings, run_tile, shared_statistics
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

REACH = 2**WAVELET_LEVELS - 1  # rows beyond a band on which its colours depend
# Bytes a pixel of the result that writing its file takes: the pixels, a copy of them, and what is encoded. Measured 6 for JPEG,
# 13 for PNG; of 16 bits, for which it counts twice, 20 for PNG and 25 for TIFF. With alpha, a third more.
WRITING = 16
ROWS = 80  # bytes a pixel of the rows that are computed at a time
SOURCE = 64  # bytes a pixel of the input


@dataclass(frozen=True)
class Bands:
    """An enlarged image; iterating over it computes it.

    Attributes:
        height, width: of the result.
    """

    pipeline: QArtSRPipeline
    image: ImageTensors
    plan: TilePlan
    settings: Settings
    height: int
    width: int

    def __iter__(self) -> Iterator[np.ndarray]:
        """(h, W, C) float32 in [0, 1], from top to bottom; C is 3 or, with alpha, 4.

        Raises:
            FloatingPointError: the network's result is not finite, not even in float32.
        """
        pipeline, image = self.pipeline, self.image
        modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        with torch.no_grad(), alone_where_needed(modules), pipeline.progress_bar(total=len(self.plan.grid)) as bar:
            try:
                rgb = image.rgb
                if image.alpha is not None and not image.keep_hidden_colors:
                    rgb = fill_transparent(rgb, image.alpha)
                grid = self.plan.grid
                enlarged = PaddedEnlargement(rgb, self.settings.scale, (grid.height, grid.width))
                alpha = PaddedEnlargement(image.alpha, self.settings.scale) if image.alpha is not None else None
                top = 0
                for band in self._aligned(enlarged, _rows(pipeline.network(), enlarged, self.plan, self.settings, bar.update)):
                    rows = slice(top, top + band.shape[-2])
                    top = rows.stop
                    colours = to_grey(band.clamp(0, 1)).expand(-1, 3, -1, -1) if image.colourless else band
                    here = None if alpha is None else enlarge_alpha(alpha[..., rows, :], (band.shape[-2], self.width))
                    yield to_numpy(ImageTensors(colours, here))
            finally:
                pipeline.maybe_free_model_hooks()

    def _aligned(self, enlarged: PaddedEnlargement, bands: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The bands, (1, 3, h, grid width), with the colours of `enlarged`, cut to the result's size; in other heights."""
        done, first = torch.empty(1, 3, 0, self.width), 0  # rows whose colours are not aligned yet, after REACH that are
        aligned, last = 0, 0
        for band in bands:
            done = torch.cat([done, band[..., : max(0, self.height - last), : self.width]], dim=-2)
            last = first + done.shape[-2]
            end = self.height if last == self.height else last - REACH
            if end <= aligned:
                continue
            reference = enlarged[..., first:last, : self.width]
            colours = align_color(done, reference, self.settings.color_fix)
            if self.settings.fidelity:
                colours = torch.lerp(colours, reference, self.settings.fidelity)
            yield colours[..., aligned - first : end - first, :]
            aligned, kept = end, max(0, end - REACH)
            done, first = done[..., kept - first :, :].clone(), kept


def enlarge_in_bands(
    pipeline: QArtSRPipeline,
    image: np.ndarray,
    tile_size: int | None = None,
    tile_overlap: int | None = None,
    color_fix: str | None = "wavelet",
    fidelity: float = 0.0,
    keep_hidden_colors: bool = False,
    free: int | None = None,
) -> Bands:
    """An enlargement by the pipeline's own scale, whose result is to be written to a file.

    Args:
        image: (H, W, C) uint8 or uint16; C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.
        tile_size, tile_overlap, fidelity, keep_hidden_colors: as in `QArtSRPipeline.__call__`.
        color_fix: "wavelet" or None.
        free: bytes of main memory; None for what `free_main_memory` says.

    Raises:
        NotEnoughMemory: it does not fit into main memory in bands either; the message says what would.
    """
    height, width = (pipeline.config["scale"] * side for side in image.shape[:2])
    free, on_cpu = free_main_memory() if free is None else free, pipeline._execution_device.type == "cpu"
    channels = max(3, image.shape[2])
    writing = WRITING * image.itemsize * channels // 3 * height * width + SOURCE * image.shape[0] * image.shape[1]
    if tile_size is None:
        left = free - writing if on_cpu else free_memory(pipeline._execution_device)
        tile_size = choose_tile_size((height, width), pipeline._pixel_bytes(), left) or TILE_SIZES[0]
    needed = writing + ROWS * (tile_size + 2 * REACH) * width
    needed += int(SURE_SHARE * tile_size * tile_size * pipeline._pixel_bytes()) if on_cpu else 0
    if needed > free:
        share = max(0, free - needed + writing) / writing
        fitting = [int(0.98 * side * share**0.5) for side in (image.shape[1], image.shape[0])]
        way_out = (
            f"At most about {fitting[0]} x {fitting[1]} pixels would fit: reduce the image, or cut it into parts that overlap."
            if all(fitting)
            else "Close other programs, or choose smaller tiles (`tile_size`, --tile-size)."
        )
        raise NotEnoughMemory(
            f"an image of {image.shape[1]} x {image.shape[0]} pixels enlarged to {width} x {height} in bands needs about"
            f" {needed / 1e9:.1f} GB of main memory, and {max(free, 0) / 1e9:.1f} GB are free. {way_out}"
        )
    (one,) = to_images(image, keep_hidden_colors=keep_hidden_colors)
    plan = pipeline.plan(one, tile_size, tile_overlap)
    scale = pipeline.config["scale"]
    settings = Settings(scale, scale, color_fix, True, False, None, pipeline.share_tile_statistics, fidelity=fidelity)
    return Bands(pipeline, one, plan, settings, *enlarged_size((one.height, one.width), scale))


def _rows(
    network: OneStepNetwork, enlarged: PaddedEnlargement, plan: TilePlan, settings: Settings, on_tile: Callable[[], object]
) -> Iterator[torch.Tensor]:
    """The network on every tile, blended: (1, 3, h, grid width), from top to bottom."""
    grid = plan.grid
    downs, acrosses = axis_weights(list(grid.tops), grid.tile_height), axis_weights(list(grid.lefts), grid.tile_width)
    with shared_statistics(network, enlarged, None, plan, settings):
        canvas = torch.empty(1, 3, 0, grid.width)
        for top, following, down in zip(grid.tops, (*grid.tops[1:], grid.height), downs, strict=True):
            canvas = torch.cat([canvas, torch.zeros(1, 3, grid.tile_height - canvas.shape[-2], grid.width)], dim=-2)
            for left, across in zip(grid.lefts, acrosses, strict=True):
                tile = Tile(top, left, grid.tile_height, grid.tile_width)
                image = run_tile(network, enlarged, None, [tile], plan.latent_factor, True)["image"].to("cpu", torch.float32)
                canvas[..., left : left + grid.tile_width].add_(image * (down[:, None] * across[None, :]))
                on_tile()
            yield canvas[..., : following - top, :]
            canvas = canvas[..., following - top :, :].clone()
