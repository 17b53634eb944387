"""Checks of everything the pipeline is given except pictures. Messages name the argument, what is expected, and what came."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch

from qartsr_pipeline.image.color_alignment import COLOR_FIXES
from qartsr_pipeline.image.tile_size import MINIMUM_TILE

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LARGEST_UPSCALE = 16


def check_components(unet: Any, vae: Any, scheduler: Any, prompt_embedding: Any, timestep: int, scale: int) -> None:
    """Do the parts fit together? Parts that are None (a pipeline taken apart on purpose) are not checked.

    Raises:
        ValueError: they do not.
    """
    if scheduler is not None:
        _check_scheduler(scheduler, timestep)
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"`scale` must be an integer from 1, but is {scale!r}.")
    if unet is None:
        return
    channels = getattr(vae, "config", {}).get("latent_channels") if vae is not None else None
    if channels is not None and channels != unet.config.in_channels:
        raise ValueError(
            f"`unet` takes {unet.config.in_channels} latent channels, but `vae` has {channels}: they are of different models."
        )
    width = unet.config.cross_attention_dim
    if prompt_embedding is not None and isinstance(width, int) and prompt_embedding.config.dim != width:
        raise ValueError(
            f"`prompt_embedding` has tokens of width {prompt_embedding.config.dim}, but `unet` has cross_attention_dim {width}: "
            "they are of different models."
        )


def _check_scheduler(scheduler: Any, timestep: int) -> None:
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


def check_arguments(
    multiple: int,
    callback_tensor_inputs: list[str],
    upscale: Any = 4,
    tile_size: Any = None,
    tile_overlap: Any = None,
    color_fix: Any = None,
    generator: Any = None,
    sample_posterior: Any = False,
    output_type: Any = "pil",
    callback_on_step_end: Any = None,
    callback_on_step_end_tensor_inputs: Any = (),
) -> None:
    """The arguments of `QArtSRPipeline.__call__`.

    Args:
        multiple: the network's total down-sampling.
        callback_tensor_inputs: the names a callback may ask for.

    Raises:
        TypeError, ValueError: see the messages.
    """
    _check_upscale(upscale)
    _check_tiles(tile_size, tile_overlap, multiple)
    if color_fix is not None and color_fix not in COLOR_FIXES:
        raise ValueError(f"`color_fix` must be one of {_listed(COLOR_FIXES)} or None, but is {color_fix!r}.")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {_listed(OUTPUT_TYPES)}, but is {output_type!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator or None, but is {type(generator).__name__}.")
    if not isinstance(sample_posterior, bool):
        raise TypeError(f"`sample_posterior` must be True or False, but is {sample_posterior!r}.")
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise TypeError(f"`callback_on_step_end` must be callable or None, but is {type(callback_on_step_end).__name__}.")
    unknown = [name for name in callback_on_step_end_tensor_inputs or () if name not in callback_tensor_inputs]
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` may hold {_listed(callback_tensor_inputs)}, but holds {_listed(unknown)}."
        )


def _check_upscale(upscale: Any) -> None:
    if isinstance(upscale, bool) or not isinstance(upscale, numbers.Real):
        raise TypeError(f"`upscale` must be a number, but is {upscale!r} ({type(upscale).__name__}).")
    if not math.isfinite(upscale) or not 0 < upscale <= LARGEST_UPSCALE:
        raise ValueError(
            f"`upscale` must be above 0 and at most {LARGEST_UPSCALE}, but is {upscale!r}. For larger enlargements "
            "call the pipeline on its own result."
        )


def _check_tiles(tile_size: Any, tile_overlap: Any, multiple: int) -> None:
    for name, value in (("tile_size", tile_size), ("tile_overlap", tile_overlap)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise TypeError(f"`{name}` must be an integer (pixels of the enlarged picture) or None, but is {value!r}.")
    minimum = -(-max(MINIMUM_TILE, 2 * multiple) // multiple) * multiple
    if tile_size is not None and tile_size < minimum:
        raise ValueError(
            f"`tile_size` must be at least {minimum} pixels of the enlarged picture for this model, but is {tile_size}. "
            "Leave it at its default to have it chosen."
        )
    if tile_overlap is None:
        return
    if tile_overlap < 0:
        raise ValueError(f"`tile_overlap` must not be negative, but is {tile_overlap}.")
    if tile_size is not None and tile_overlap >= tile_size:
        raise ValueError(f"`tile_overlap` ({tile_overlap}) must be smaller than `tile_size` ({tile_size}).")


def _listed(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
