"""The video network on tensors, and what surrounds it for one clip: enlarge, encode, one step in windows, decode, align colours.

For engineers; users call the pipeline. The network itself is three stages,

    z_L = vae.encode(x)                              streamed, causal
    z_H = z_L - sigma_T v(z_L; T, c)                 in windows of frames and tiles, which are blended
    y   = vae.decode(z_H)                            streamed, causal

Everything here is a chain of generators: a frame is computed when it is asked for, and what is held does not grow with the clip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from qartsr_pipeline.image.conversion import to_grey
from qartsr_pipeline.image.resize import enlarged_size, pad_to_multiple, resize
from qartsr_pipeline.image.tiles import TileGrid
from qartsr_pipeline.overflow import OverflowMemory, run_finite
from qartsr_pipeline.video.causal_vae import StreamedStage, spatial_factor, streamed_decoder, streamed_encoder, temporal_factor
from qartsr_pipeline.video.clip_color import ClipColor
from qartsr_pipeline.video.frames import is_colourless, scenes
from qartsr_pipeline.video.windows import refined_in_windows

GROUP = 4  # frames that are encoded or decoded at once where the autoencoder leaves the choice


@dataclass
class VideoNetwork:
    """The transformer's step and the autoencoder's two stages. All take and return tensors on `device`.

    Attributes:
        prompt_embeds: (1, tokens, dim).
        timestep: T. sigma: sigma_T, which is T divided by the number of training timesteps.
        overflows: which stages overflowed before in 16 bits; the pipeline's own, so that it outlives the call.
    """

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    prompt_embeds: torch.Tensor
    timestep: int
    sigma: float
    device: torch.device
    overflows: OverflowMemory = field(default_factory=OverflowMemory)

    def encoder(self) -> StreamedStage:
        """A new stream; see `causal_vae.streamed_encoder`."""
        return streamed_encoder(self.vae, self.device, self.overflows)

    def decoder(self) -> StreamedStage:
        """A new stream; see `causal_vae.streamed_decoder`."""
        return streamed_decoder(self.vae, self.device, self.overflows)

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """z_L -> z_H, (B, C, f, h, w) with h and w multiples of the transformer's patch."""

        def stage(z: torch.Tensor) -> torch.Tensor:
            prompt = self.prompt_embeds.to(z).expand(z.shape[0], -1, -1)  # (B, tokens, dim)
            timestep = torch.full((z.shape[0],), self.timestep, device=z.device)
            v = self.transformer(z, timestep, encoder_hidden_states=prompt, return_dict=False)[0]
            return z - self.sigma * v

        return run_finite("transformer", stage, self.transformer, latents.to(self.device), self.overflows)


@dataclass(frozen=True)
class ClipPlan:
    """How a clip's frames are cut, and what is done with them.

    Attributes:
        scale: the network's own enlargement. upscale: the one asked for.
        multiple, minimum: enlarged frames are padded to multiples of the one and at least the other.
        vae_grid: tiles of the padded frame that the autoencoder sees, in pixels.
        grid: tiles that the transformer sees, in pixels.
        length, overlap: of the transformer's windows, in latents.
        align_color: whether colours are aligned, see `ClipColor`.
    """

    scale: int
    upscale: float
    multiple: int
    minimum: int
    vae_grid: TileGrid
    grid: TileGrid
    length: int
    overlap: int
    align_color: bool


def upscaled_frames(network: VideoNetwork, frames: Iterator[torch.Tensor], plan: ClipPlan) -> Iterator[torch.Tensor]:
    """One enlarged frame for each frame, in order; all (1, 3, H, W) float32 in [0, 1] on the CPU."""
    for scene in scenes(frames):
        yield from _scene(network, scene, plan)


def _scene(network: VideoNetwork, frames: Iterable[torch.Tensor], plan: ClipPlan) -> Iterator[torch.Tensor]:
    """Frames without a cut."""
    waiting: deque[torch.Tensor] = deque()  # frames that went in and have not come out

    def padded() -> Iterator[torch.Tensor]:
        for frame in frames:
            waiting.append(frame)
            yield pad_to_multiple(_enlarged(frame, plan), plan.multiple, plan.minimum) * 2 - 1

    latents = encoded(network, padded(), plan.vae_grid)
    refined = refined_in_windows(latents, lambda z: refine(network, z, plan.grid), plan.length, plan.overlap)
    align = ClipColor() if plan.align_color else None
    for group in decoded(network, refined, plan.vae_grid):
        for image in group.unbind(2):
            if not waiting:  # the clip was padded to whole latents
                return
            frame = waiting.popleft()
            enlarged = _enlarged(frame, plan)
            image = image[..., : enlarged.shape[-2], : enlarged.shape[-1]] / 2 + 0.5
            if align is not None:
                image = align(image, enlarged)
            result = resize(image, enlarged_size((frame.shape[-2], frame.shape[-1]), plan.upscale)).clamp(0, 1)
            yield to_grey(result).expand(-1, 3, -1, -1) if is_colourless(frame) else result


def _enlarged(frame: torch.Tensor, plan: ClipPlan) -> torch.Tensor:
    return resize(frame, enlarged_size((frame.shape[-2], frame.shape[-1]), plan.scale))


def encoded(network: VideoNetwork, frames: Iterator[torch.Tensor], grid: TileGrid) -> Iterator[torch.Tensor]:
    """Frames (1, 3, H, W) in [-1, 1] -> latents (1, C, f, h, w) float32 on the CPU, a few at a time.

    The last frame is repeated up to a whole latent.
    """
    encoders = [network.encoder() for _ in grid]
    for group in _grouped(frames, temporal_factor(network.vae)):
        yield _in_tiles(group, grid, encoders, 1, spatial_factor(network.vae))


def _grouped(frames: Iterator[torch.Tensor], factor: int) -> Iterator[torch.Tensor]:
    """Clips (1, 3, F, H, W): the first frame alone, then ``factor`` at a time; where that is 1, `GROUP` at a time."""
    held: list[torch.Tensor] = []
    wanted = GROUP if factor == 1 else 1
    for frame in frames:
        held.append(frame)
        if len(held) == wanted:
            yield torch.stack(held, dim=2)
            held, wanted = [], GROUP if factor == 1 else factor
    if held:
        missing = 0 if factor == 1 else wanted - len(held)
        yield torch.stack(held + held[-1:] * missing, dim=2)


def decoded(network: VideoNetwork, latents: Iterator[torch.Tensor], grid: TileGrid) -> Iterator[torch.Tensor]:
    """Latents (1, C, f, h, w) -> frames (1, 3, F, H, W), about [-1, 1], float32 on the CPU, a few at a time."""
    decoders = [network.decoder() for _ in grid]
    at_once = GROUP if temporal_factor(network.vae) == 1 else 1
    for part in latents:
        for group in part.split(at_once, dim=2):
            yield _in_tiles(group, grid, decoders, spatial_factor(network.vae), 1)


def refine(network: VideoNetwork, latents: torch.Tensor, grid: TileGrid) -> torch.Tensor:
    """z_L -> z_H for one window (1, C, f, h, w), in tiles, blended in float32 on the CPU."""
    factor = spatial_factor(network.vae)
    return _in_tiles(latents, grid, [network.step] * len(grid), factor, factor)


def _in_tiles(
    clip: torch.Tensor, grid: TileGrid, stages: Sequence[Callable[[torch.Tensor], torch.Tensor]], before: int, after: int
) -> torch.Tensor:
    """Each tile through its stage. An element of the input spans ``before`` pixels of the grid, one of the result ``after``."""
    if len(grid) == 1:
        return stages[0](clip).to("cpu", torch.float32)
    canvas: torch.Tensor | None = None
    for tile, window, stage in zip(grid, grid.windows(after), stages, strict=True):
        result = stage(tile.cut(clip, before)).to("cpu", torch.float32)
        if canvas is None:
            canvas = result.new_zeros(*result.shape[:3], grid.height // after, grid.width // after)
        tile.cut(canvas, after).add_(result * window)
    assert canvas is not None  # a grid has tiles
    return canvas
