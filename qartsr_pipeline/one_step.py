"""The network on tensors, and what surrounds it for one image: enlarge, run in tiles, align colours, resample.

For engineers; users call the pipeline. The network itself is three stages,

    z_L = vae.encode(x) * scaling_factor
    z_H = (z_L - sqrt(1 - abar_T) eps(z_L; T, c)) / sqrt(abar_T)
    y   = vae.decode(z_H / scaling_factor)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor

from qartsr_pipeline.image.color_alignment import align_color
from qartsr_pipeline.image.conversion import ImageTensors, to_grey
from qartsr_pipeline.image.resize import enlarge_alpha, enlarged_size, fill_transparent, pad_to_multiple, resize
from qartsr_pipeline.image.tile_statistics import SharedStatistics, sample_windows
from qartsr_pipeline.image.tiles import Tile, TileGrid, TilePlan, Windowed
from qartsr_pipeline.overflow import OverflowMemory, run_finite

# Called with what one tile of the grid gave ("latents" and maybe "image"); what it returns takes their place.
TileCallback = Callable[[dict[str, torch.Tensor], Tile, TileGrid], dict[str, torch.Tensor]]


@dataclass
class OneStepNetwork:
    """The three stages of one-step super-resolution. Every stage takes and returns tensors on `device`.

    Attributes:
        prompt_embeds: (1, tokens, dim).
        timestep: T.
        alpha_bar: abar_T, `scheduler.alphas_cumprod[T]`.
        overflows: which stages overflowed before in 16 bits; the pipeline's own, so that it outlives the call.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    prompt_embeds: torch.Tensor
    timestep: int
    alpha_bar: float
    device: torch.device
    overflows: OverflowMemory = field(default_factory=OverflowMemory)

    def encode(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> z_L (B, C, H/f, W/f): the posterior's mode, or a draw made with standard
        normal `noise` of z_L's shape."""

        def stage(x: torch.Tensor) -> torch.Tensor:
            posterior = self.vae.encode(x).latent_dist
            latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
            return latents * self.vae.config["scaling_factor"]

        return run_finite("encode", stage, self.vae, x.to(self.device), self.overflows)

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """z_L -> z_H, same shape (OSEDiff's equation)."""

        def stage(z: torch.Tensor) -> torch.Tensor:
            prompt = self.prompt_embeds.to(z).expand(z.shape[0], -1, -1)  # (B, tokens, dim)
            eps = self.unet(z, self.timestep, encoder_hidden_states=prompt, return_dict=False)[0]
            return (z - math.sqrt(1 - self.alpha_bar) * eps) / math.sqrt(self.alpha_bar)

        return run_finite("unet", stage, self.unet, latents, self.overflows)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """z_H -> (B, 3, H, W), about [-1, 1]."""

        def stage(z: torch.Tensor) -> torch.Tensor:
            return self.vae.decode(z / self.vae.config["scaling_factor"], return_dict=False)[0]

        return run_finite("decode", stage, self.vae, latents, self.overflows)


@dataclass(frozen=True)
class Settings:
    """The arguments of a call that concern every image; see `QArtSRPipeline.__call__`.

    Attributes:
        scale: the network's own enlargement.
        decode: False to stop at z_H.
        share_statistics: all tiles of an image are normalized alike.
        interrupted: asked before every pass of the network; once it is True, nothing more is computed.
        fidelity: share of the enlarged input in the result, 0 to 1.
    """

    scale: int
    upscale: float
    color_fix: str | None
    decode: bool
    sample_posterior: bool
    generator: torch.Generator | None
    share_statistics: bool = True
    interrupted: Callable[[], bool] = lambda: False
    fidelity: float = 0.0


def upscale_image(
    network: OneStepNetwork, image: ImageTensors, plan: TilePlan, settings: Settings, on_tile: TileCallback | None = None
) -> ImageTensors:
    """The enlarged image; see `run_tiles` for `on_tile`."""
    enlarged, result = run_network(network, image, plan, settings, on_tile)
    return finish(image, enlarged, result[..., : enlarged.shape[-2], : enlarged.shape[-1]], settings)


def run_network(
    network: OneStepNetwork, image: ImageTensors, plan: TilePlan, settings: Settings, on_tile: TileCallback | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The bicubic enlargement that the network starts from, (1, 3, sH, sW), about [0, 1], and what `run_tiles` makes of it."""
    rgb = image.rgb
    if image.alpha is not None and not image.keep_hidden_colors:
        rgb = fill_transparent(rgb, image.alpha)
    enlarged = resize(rgb, enlarged_size((image.height, image.width), settings.scale))
    return enlarged, run_tiles(network, pad_to_multiple(enlarged, plan.multiple, plan.minimum), plan, settings, on_tile)


def finish(image: ImageTensors, enlarged: torch.Tensor, result: torch.Tensor, settings: Settings) -> ImageTensors:
    """Colour alignment of `result` to `enlarged`, both (1, 3, sH, sW); the blend; resampling to the size asked for; alpha."""
    size = enlarged_size((image.height, image.width), settings.upscale)
    aligned = align_color(result, enlarged, settings.color_fix)
    if settings.fidelity:
        aligned = torch.lerp(aligned, enlarged, settings.fidelity, out=None if aligned is result else aligned)
    rgb = resize(aligned, size)
    rgb = rgb.clamp(0, 1) if rgb is result else rgb.clamp_(0, 1)  # the result may be a tile that a callback has kept
    if image.colourless:
        rgb = to_grey(rgb).expand(-1, 3, -1, -1)
    alpha = None if image.alpha is None else enlarge_alpha(image.alpha, size)
    return ImageTensors(rgb=rgb, alpha=alpha, greyscale=image.greyscale, sixteen_bit=image.sixteen_bit)


def run_tiles(
    network: OneStepNetwork, padded: torch.Tensor, plan: TilePlan, settings: Settings, on_tile: TileCallback | None = None
) -> torch.Tensor:
    """The network on every tile of `padded`, (1, 3, H, W) in [0, 1], blended on the CPU in float32.

    Args:
        on_tile: called after every tile; what it returns takes the tile's place.

    Returns:
        (1, 3, H, W), about [0, 1]; or z_H, (1, C, H/f, W/f), unless `settings.decode`. Memory on the network's device depends on
        the tile only. Where the call was interrupted before a tile, `padded` itself is there, or z_H is 0.
    """
    grid = plan.grid
    kind, shrink = ("image", 1) if settings.decode else ("latents", plan.latent_factor)
    channels = 3 if settings.decode else network.vae.config["latent_channels"]
    noise = draw_noise(network, padded, plan.latent_factor, settings)
    around = copy_context()  # a callback may call the network on another image, which has statistics of its own

    def run(tile: Tile) -> torch.Tensor:
        if settings.interrupted():
            sides = (tile.height // shrink, tile.width // shrink)
            return tile.cut(padded) if settings.decode else torch.zeros(1, channels, *sides)
        tensors = run_tile(network, padded, noise, [tile], plan.latent_factor, settings.decode)
        return (around.run(on_tile, tensors, tile, grid) if on_tile else tensors)[kind].to("cpu", torch.float32)

    with shared_statistics(network, padded, noise, plan, settings):
        if len(grid) == 1:
            return run(next(iter(grid)))
        canvas = torch.zeros(1, channels, grid.height // shrink, grid.width // shrink, dtype=torch.float32)
        for tile, window in zip(grid, grid.windows(shrink), strict=True):
            tile.cut(canvas, shrink).add_(run(tile) * window)
    return canvas


def run_tile(
    network: OneStepNetwork,
    padded: Windowed,
    noise: torch.Tensor | None,
    tiles: list[Tile],
    latent_factor: int,
    decode: bool,
) -> dict[str, torch.Tensor]:
    """One pass over a batch of B tiles: "latents", z_H (B, C, h/f, w/f), and if `decode` "image", float32 (B, 3, h, w), about
    [0, 1].
    """
    x = torch.cat([tile.cut(padded) for tile in tiles]) * 2 - 1
    if noise is not None:
        noise = torch.cat([tile.cut(noise, latent_factor) for tile in tiles])
    latents = network.step(network.encode(x, noise))
    if not decode:
        return {"latents": latents}
    return {"latents": latents, "image": network.decode(latents).float() / 2 + 0.5}  # 16 bits have too few just below 1


def shared_statistics(
    network: OneStepNetwork, padded: Windowed, noise: torch.Tensor | None, plan: TilePlan, settings: Settings
) -> AbstractContextManager[None]:
    """A context in which all tiles are normalized alike, with statistics measured here; does nothing for a single tile."""
    if len(plan.grid) == 1 or not settings.share_statistics:
        return nullcontext()
    statistics = SharedStatistics([network.unet, network.vae])
    tile = max(plan.grid.tile_height, plan.grid.tile_width)
    for windows in sample_windows((plan.grid.height, plan.grid.width), tile, plan.multiple, len(plan.grid)):
        if settings.interrupted():
            return nullcontext()
        with statistics.record():
            run_tile(network, padded, noise, windows, plan.latent_factor, settings.decode)
    return statistics.apply()


def draw_noise(network: OneStepNetwork, padded: torch.Tensor, latent_factor: int, settings: Settings) -> torch.Tensor | None:
    """Noise for the whole latent, float32 (1, C, H/f, W/f) on the CPU, or None when the posterior's mode is wanted."""
    if not settings.sample_posterior:
        return None
    height, width = (side // latent_factor for side in padded.shape[-2:])
    shape = (1, network.vae.config["latent_channels"], height, width)
    device = torch.device("cpu") if settings.generator is None else settings.generator.device
    return randn_tensor(shape, generator=settings.generator, device=device, dtype=torch.float32).cpu()
