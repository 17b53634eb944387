"""Checks of everything that the pipeline takes but images. Messages name the argument, what is expected, and what was given."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from qartsr_pipeline.image.color_alignment import COLOR_FIXES
from qartsr_pipeline.image.tile_size import MINIMUM_TILE
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.quantization.diffusers_quantizer import attached_scheme

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST_UPSCALE = 16


def check_components(
    unet: UNet2DConditionModel | None,
    vae: AutoencoderKL | None,
    scheduler: DDPMScheduler | None,
    prompt_embedding: PromptEmbedding | None,
    timestep: int,
    scale: int,
) -> None:
    """Checks that the components fit together. Those that are None (a pipeline taken apart on purpose) are left out.

    Raises:
        ValueError: they do not fit.
    """
    if scheduler is not None:
        _check_scheduler(scheduler, timestep)
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"`scale` must be an integer from 1, but is {scale!r}.")
    if unet is None:
        return
    channels = getattr(vae, "config", {}).get("latent_channels") if vae is not None else None
    if channels is not None and channels != unet.config["in_channels"]:
        raise ValueError(
            f"`unet` takes {unet.config['in_channels']} latent channels, but `vae` has {channels}: they are of different models."
        )
    scheme = attached_scheme(unet)
    if scheme is not None and scheme.folding is not None and scheme.folding.timestep != timestep:
        raise ValueError(
            f"`timestep` is {timestep}, but the constants of timestep {scheme.folding.timestep} are folded into `unet`, so images"
            f" would be wrong. Give timestep={scheme.folding.timestep}, or a UNet that was quantized at timestep {timestep}."
        )
    width = unet.config["cross_attention_dim"]
    if prompt_embedding is not None and isinstance(width, int) and prompt_embedding.config["dim"] != width:
        raise ValueError(
            f"`prompt_embedding` has tokens of width {prompt_embedding.config['dim']}, but `unet` has cross_attention_dim"
            f" {width}: they are of different models."
        )


def _check_scheduler(scheduler: DDPMScheduler, timestep: int) -> None:
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ValueError(f"`scheduler` has prediction_type {prediction!r}; one-step super-resolution needs 'epsilon'.")
    count = len(scheduler.alphas_cumprod)
    if not isinstance(timestep, int) or not 0 <= timestep < count:
        raise ValueError(f"`timestep` must be an integer from 0 to {count - 1}, as `scheduler` has it, but is {timestep!r}.")
    if float(scheduler.alphas_cumprod[timestep]) <= 0:
        raise ValueError(
            f"`timestep` {timestep} leaves no signal with this `scheduler` (alphas_cumprod is 0). Choose a smaller one."
        )


def check_upscale(upscale: object) -> None:
    if isinstance(upscale, bool) or not isinstance(upscale, numbers.Real):
        raise TypeError(f"`upscale` must be a number, but is {upscale!r} ({type(upscale).__name__}).")
    if not math.isfinite(upscale) or not 0 < float(upscale) <= LARGEST_UPSCALE:
        raise ValueError(
            f"`upscale` must be above 0 and at most {LARGEST_UPSCALE}, but is {upscale!r}. For larger enlargements "
            "call the pipeline on its own result."
        )


def check_tiles(tile_size: object, tile_overlap: object, multiple: int) -> None:
    """`multiple`: the network's total down-sampling."""
    size, overlap = _pixels("tile_size", tile_size), _pixels("tile_overlap", tile_overlap)
    minimum = -(-max(MINIMUM_TILE, 2 * multiple) // multiple) * multiple
    if size is not None and size < minimum:
        raise ValueError(
            f"`tile_size` must be at least {minimum} pixels of the enlarged image for this model, but is {size}. "
            "Leave it at its default to have it chosen."
        )
    if overlap is None:
        return
    if overlap < 0:
        raise ValueError(f"`tile_overlap` must not be negative, but is {overlap}.")
    if size is not None and overlap >= size:
        raise ValueError(f"`tile_overlap` ({overlap}) must be smaller than `tile_size` ({size}).")


def _pixels(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer (pixels of the enlarged image) or None, but is {value!r}.")
    return int(value)


def check_choices(color_fix: object, output_type: object, keep_hidden_colors: object) -> None:
    if color_fix is not None and color_fix not in COLOR_FIXES:
        raise ValueError(f"`color_fix` must be one of {_listed(COLOR_FIXES)} or None, but is {color_fix!r}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {_listed(OUTPUT_TYPES)}, but is {output_type!r}.")
    if not isinstance(keep_hidden_colors, bool):
        raise TypeError(f"`keep_hidden_colors` must be True or False, but is {keep_hidden_colors!r}.")


def check_sampling(generator: object, sample_posterior: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator or None, but is {type(generator).__name__}.")
    if not isinstance(sample_posterior, bool):
        raise TypeError(f"`sample_posterior` must be True or False, but is {sample_posterior!r}.")


def check_callback(callback: object, tensor_inputs: Iterable[str], allowed: list[str]) -> None:
    """`allowed`: the names of tensors that a callback may ask for."""
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be callable or None, but is {type(callback).__name__}.")
    unknown = [name for name in tensor_inputs if name not in allowed]
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` may hold {_listed(allowed)}, but holds {_listed(unknown)}.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
