"""What happens to one picture between its conversion and the result: enlarge, run the network in tiles, align, resample."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from qartsr_pipeline.image.alpha import enlarge_alpha, fill_transparent
from qartsr_pipeline.image.color_alignment import align_color
from qartsr_pipeline.image.output_conversion import luma
from qartsr_pipeline.image.picture import Picture
from qartsr_pipeline.image.resize import enlarged_size, pad_to_multiple, resize
from qartsr_pipeline.image.tile_size import TilePlan
from qartsr_pipeline.image.tile_statistics import SharedStatistics, sample_windows
from qartsr_pipeline.image.tiles import Tile, TileGrid
from qartsr_pipeline.one_step import OneStepNetwork


@dataclass(frozen=True)
class Settings:
    """The arguments of a call that concern every picture; see `QArtSRPipeline.__call__`.

    Attributes:
        scale: the network's own enlargement.
        decode: False to stop at z_H.
        share_statistics: all tiles of a picture are normalised alike.
    """

    scale: int
    upscale: float
    color_fix: str | None
    decode: bool
    sample_posterior: bool
    generator: torch.Generator | None
    share_statistics: bool = True


class StepReporter:
    """Tells the progress bar and the user's callback about every finished tile."""

    def __init__(self, pipeline: Any, bar: Any, callback: Callable | None, tensor_inputs: list[str]):
        self.pipeline, self.bar, self.callback, self.tensor_inputs = pipeline, bar, callback, tensor_inputs
        self.step = 0

    def finished(self, tensors: dict[str, torch.Tensor], tile: Tile, grid: TileGrid) -> dict[str, torch.Tensor]:
        """`tensors` of one tile of the grid, as the callback left them."""
        self.pipeline._current_tile = (tile, grid)
        if self.callback is not None:
            chosen = {name: tensors[name] for name in self.tensor_inputs if name in tensors}
            returned = self.callback(self.pipeline, self.step, self.pipeline.config.timestep, chosen)
            tensors = {name: (returned or {}).get(name, tensor) for name, tensor in tensors.items()}
        self.step += 1
        self.bar.update()
        return tensors


def upscale_picture(
    network: OneStepNetwork, picture: Picture, plan: TilePlan, settings: Settings, reporter: StepReporter
) -> Picture | torch.Tensor:
    """The enlarged picture, or its z_H, float32 (1, C, h, w) on the CPU, unless `settings.decode`."""
    rgb = picture.rgb if picture.alpha is None else fill_transparent(picture.rgb, picture.alpha)
    enlarged = resize(rgb, enlarged_size(picture.size, settings.scale))  # (1, 3, sH, sW), about [0, 1]
    result = run_tiles(network, pad_to_multiple(enlarged, plan.multiple, plan.minimum), plan, settings, reporter)
    if not settings.decode:
        return result
    result = result[..., : enlarged.shape[-2], : enlarged.shape[-1]]
    return finish(picture, enlarged, result, settings)


def finish(picture: Picture, enlarged: torch.Tensor, result: torch.Tensor, settings: Settings) -> Picture:
    """Colour alignment of `result` to `enlarged`, both (1, 3, sH, sW); resampling to the size asked for; alpha."""
    size = enlarged_size(picture.size, settings.upscale)
    rgb = resize(align_color(result, enlarged, settings.color_fix), size)
    rgb = rgb.clamp(0, 1) if rgb is result else rgb.clamp_(0, 1)  # the result may be a tile that a callback has kept
    if picture.greyscale:
        rgb = luma(rgb).expand(-1, 3, -1, -1)
    alpha = None if picture.alpha is None else enlarge_alpha(picture.alpha, size)
    return Picture(rgb=rgb, alpha=alpha, greyscale=picture.greyscale, sixteen_bit=picture.sixteen_bit)


def run_tiles(
    network: OneStepNetwork, padded: torch.Tensor, plan: TilePlan, settings: Settings, reporter: StepReporter
) -> torch.Tensor:
    """The network on every tile of `padded`, (1, 3, H, W) in [0, 1], blended on the CPU in float32.

    Returns:
        (1, 3, H, W), about [0, 1]; or z_H, (1, C, H/f, W/f), unless `settings.decode`. Memory on the network's device depends on
        the tile only.
    """
    kind, shrink = ("image", 1) if settings.decode else ("latents", plan.latent_factor)
    noise = draw_noise(network, padded, plan.latent_factor, settings)
    canvas = None
    with shared_statistics(network, padded, noise, plan, settings):
        for tile, window in zip(plan.grid, plan.grid.windows(shrink), strict=True):
            tensors = run_tile(network, padded, noise, [tile], plan.latent_factor, settings.decode)
            part = reporter.finished(tensors, tile, plan.grid)[kind].to("cpu", torch.float32)
            if len(plan.grid) == 1:
                return part
            if canvas is None:
                canvas = part.new_zeros(1, part.shape[1], plan.grid.height // shrink, plan.grid.width // shrink)
            tile.cut(canvas, shrink).add_(part * window)
    return canvas


def run_tile(
    network: OneStepNetwork,
    padded: torch.Tensor,
    noise: torch.Tensor | None,
    tiles: list[Tile],
    latent_factor: int,
    decode: bool,
) -> dict[str, torch.Tensor]:
    """One pass over a batch of B tiles: "latents", z_H (B, C, h/f, w/f), and if `decode` "image", (B, 3, h, w), about [0, 1]."""
    x = torch.cat([tile.cut(padded) for tile in tiles]) * 2 - 1
    if noise is not None:
        noise = torch.cat([tile.cut(noise, latent_factor) for tile in tiles])
    latents = network.step(network.encode(x, noise))
    return {"latents": latents, "image": network.decode(latents) / 2 + 0.5} if decode else {"latents": latents}


def shared_statistics(
    network: OneStepNetwork, padded: torch.Tensor, noise: torch.Tensor | None, plan: TilePlan, settings: Settings
) -> Any:
    """Context in which all tiles are normalised alike: measures on sample windows first; does nothing for a single tile."""
    if len(plan.grid) == 1 or not settings.share_statistics:
        return nullcontext()
    statistics = SharedStatistics([network.unet, network.vae])
    tile = max(plan.grid.tile_height, plan.grid.tile_width)
    for windows in sample_windows((plan.grid.height, plan.grid.width), tile, plan.multiple, len(plan.grid)):
        with statistics.record():
            run_tile(network, padded, noise, windows, plan.latent_factor, settings.decode)
    return statistics.apply()


def draw_noise(network: OneStepNetwork, padded: torch.Tensor, latent_factor: int, settings: Settings) -> torch.Tensor | None:
    """Noise for the whole latent, float32 (1, C, H/f, W/f) on the CPU, or None when the posterior's mode is wanted."""
    if not settings.sample_posterior:
        return None
    height, width = (side // latent_factor for side in padded.shape[-2:])
    shape = (1, network.vae.config.latent_channels, height, width)
    device = torch.device("cpu") if settings.generator is None else settings.generator.device
    return randn_tensor(shape, generator=settings.generator, device=device, dtype=torch.float32).cpu()
