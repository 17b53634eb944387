"""Enlarges an image exactly as OSEDiff's test script does, for comparisons with its published results.

It differs from the pipeline's own call:

- Images are enlarged by Pillow's bicubic filter in 8 bits, then reduced to multiples of 8 pixels by its Lanczos filter.
- Images smaller than `process_size` / `upscale` are first enlarged to that size.
- The UNet and the VAE's encoder and decoder have tiles of their own (`osediff_tiles`).
- Values are cut off to 8 bits before and after the colours are aligned.

One difference from OSEDiff's script remains: every result here has exactly `upscale` times the size of the image. In the script,
results of small images keep the enlarged size, because it discards its last resampling, and results whose sides are not multiples
of 8 lose the remaining pixels.
"""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch
from diffusers.utils.torch_utils import randn_tensor

from qartsr_pipeline.convert.osediff_tiles import in_latent_tiles, osediff_vae_tiles
from qartsr_pipeline.image.color_alignment import COLOR_FIXES, align_color
from qartsr_pipeline.one_step import OneStepNetwork
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

MULTIPLE = 8  # pixels of the enlarged image


@torch.no_grad()
def upscale_like_osediff(
    pipeline: QArtSRPipeline,
    image: PIL.Image.Image,
    upscale: int = 4,
    process_size: int = 512,
    color_fix: str | None = "adain",
    latent_tile: int = 96,
    latent_overlap: int = 32,
    vae_encoder_tile: int | None = 1024,
    vae_decoder_tile: int | None = 224,
    sample_posterior: bool = True,
    generator: torch.Generator | None = None,
    prompt: str | None = None,
) -> PIL.Image.Image:
    """Enlarges one image. The defaults are those of OSEDiff's script, except for float16 and the prompt, which it takes from an
    image tagger.

    Args:
        pipeline: its VAE must divide the sides by 8, as Stable Diffusion's does, or by less.
        image: of any mode; treated as RGB.
        upscale: an integer from 1.
        process_size: smallest side of the enlarged image, in pixels; 0 for no minimum.
        color_fix: "adain", "wavelet" or None ("nofix").
        latent_tile, latent_overlap: in latent elements; see `in_latent_tiles`.
        vae_encoder_tile, vae_decoder_tile: in pixels and in latent elements, multiples of 32; None for the whole image at once,
            without borders between tiles. They matter above 1088 pixels (encoder) and 246 latent elements (decoder) a side.
        sample_posterior: draw the latent, as OSEDiff does, or take the mode.
        generator: source of the draw. None: torch's default one, as in OSEDiff's script.
        prompt: as in the pipeline's call.

    Returns:
        RGB, `upscale` times as wide and high.

    Raises:
        ValueError: `upscale`, `color_fix` or a tile size is not valid.
    """
    if not isinstance(upscale, int) or upscale < 1:
        raise ValueError(f"`upscale` must be an integer from 1, as in OSEDiff, but is {upscale!r}.")
    if color_fix not in (*COLOR_FIXES, None):
        raise ValueError(f"`color_fix` must be {', '.join(map(repr, COLOR_FIXES))} or None, but is {color_fix!r}.")
    enlarged = enlarge(image.convert("RGB"), upscale, process_size)
    network = pipeline.network(prompt)
    try:
        x = _to_tensor(enlarged) * 2 - 1
        factor = pipeline.vae_scale_factor
        noise = _noise(network, factor, x, generator) if sample_posterior else None
        with osediff_vae_tiles(network.vae, factor, vae_encoder_tile, vae_decoder_tile):
            latents = in_latent_tiles(network.step, network.encode(x, noise), latent_tile, latent_overlap)
            result = network.decode(latents).float().cpu().clamp(-1, 1) * 0.5 + 0.5
    finally:
        pipeline.maybe_free_model_hooks()
    if color_fix is not None:
        result = align_color(_to_tensor(_to_image(result)), _to_tensor(enlarged), color_fix)
    size = image.width * upscale, image.height * upscale
    enlarged = _to_image(result)
    return enlarged if enlarged.size == size else enlarged.resize(size, PIL.Image.Resampling.BICUBIC)


def enlarge(image: PIL.Image.Image, upscale: int, process_size: int) -> PIL.Image.Image:
    """The network's input: `image`, of mode RGB, enlarged, with sides that are multiples of 8."""
    smallest = process_size // upscale
    if min(image.size) < smallest:
        factor = smallest / min(image.size)
        image = image.resize((int(factor * image.width), int(factor * image.height)), PIL.Image.Resampling.BICUBIC)
    image = image.resize((image.width * upscale, image.height * upscale), PIL.Image.Resampling.BICUBIC)
    width, height = (max(MULTIPLE, side - side % MULTIPLE) for side in image.size)
    return image.resize((width, height), PIL.Image.Resampling.LANCZOS)


def _noise(network: OneStepNetwork, factor: int, x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    shape = (1, network.vae.config["latent_channels"], x.shape[-2] // factor, x.shape[-1] // factor)
    return randn_tensor(shape, generator=generator, device=network.device, dtype=torch.float32)


def _to_tensor(image: PIL.Image.Image) -> torch.Tensor:
    """RGB -> float32 (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255


def _to_image(tensor: torch.Tensor) -> PIL.Image.Image:
    """(1, 3, H, W) -> RGB; values are cut off, not rounded, to 8 bits."""
    values = (tensor[0].clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).contiguous()
    return PIL.Image.fromarray(values.numpy())
