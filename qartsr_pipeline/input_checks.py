"""Checks of everything that the pipeline takes but images. Messages name the argument, what is expected, and what was given.

Numbers may be numpy's; what is passed on is Python's own, because eight bits overflow in the arithmetic of sizes.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from qartsr_pipeline.image.color_alignment import COLOR_FIXES
from qartsr_pipeline.image.tiles import MINIMUM_TILE
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


@dataclass(frozen=True)
class CallArguments:
    """The arguments of `QArtSRPipeline.__call__` that hold for all its images; see there."""

    upscale: float = 4
    tile_size: int | None = None
    tile_overlap: int | None = None
    color_fix: str | None = "wavelet"
    generator: torch.Generator | None = None
    sample_posterior: bool = False
    output_type: str = "pil"
    callback_on_step_end: Callable[..., Any] | None = None
    callback_on_step_end_tensor_inputs: Iterable[str] | None = ("image",)
    keep_hidden_colors: bool = False
    fidelity: float = 0.0

    def checked(self, multiple: int, tensors: list[str]) -> CallArguments:
        """The same with plain Python values.

        Args:
            multiple: the network's total down-sampling.
            tensors: what a callback may ask for.

        Raises:
            TypeError, ValueError: one of them is not as described; the message names it.
        """
        size, overlap = _tiles(self.tile_size, self.tile_overlap, multiple)
        _check_choice("color_fix", self.color_fix, COLOR_FIXES, " or None", may_be_none=True)
        _check_choice("output_type", self.output_type, OUTPUT_TYPES)
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(f"`generator` must be a torch.Generator or None, but is {type(self.generator).__name__}.")
        for name in ("sample_posterior", "keep_hidden_colors"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"`{name}` must be True or False, but is {_shown(getattr(self, name))}.")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise TypeError(
                f"`callback_on_step_end` must be callable or None, but is {type(self.callback_on_step_end).__name__}."
            )
        return replace(
            self,
            upscale=check_upscale(self.upscale),
            tile_size=size,
            tile_overlap=overlap,
            sample_posterior=bool(self.sample_posterior),
            keep_hidden_colors=bool(self.keep_hidden_colors),
            fidelity=_share("fidelity", self.fidelity),
            callback_on_step_end_tensor_inputs=_names(self.callback_on_step_end_tensor_inputs, tensors),
        )


def check_upscale(upscale: object) -> float:
    """The enlargement as Python's number; raises TypeError or ValueError."""
    if isinstance(upscale, (bool, np.bool_)) or not isinstance(upscale, numbers.Real):
        raise TypeError(f"`upscale` must be a number, but is {_shown(upscale)} ({type(upscale).__name__}).")
    number: Any = upscale  # NaN is in no range, and an integer may be too large for a float
    if not 0 < number <= LARGEST_UPSCALE or float(number) == 0:
        raise ValueError(
            f"`upscale` must be above 0 and at most {LARGEST_UPSCALE}, but is {_shown(upscale)}. For larger enlargements "
            "call the pipeline on its own result."
        )
    return int(number) if isinstance(upscale, numbers.Integral) else float(number)


def _share(name: str, value: object) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, but is {_shown(value)} ({type(value).__name__}).")
    number: Any = value
    if not 0 <= number <= 1:  # NaN is in no range
        raise ValueError(f"`{name}` must be from 0 to 1, but is {_shown(value)}.")
    return float(number)


def _tiles(tile_size: object, tile_overlap: object, multiple: int) -> tuple[int | None, int | None]:
    size, overlap = _pixels("tile_size", tile_size), _pixels("tile_overlap", tile_overlap)
    minimum = -(-max(MINIMUM_TILE, 2 * multiple) // multiple) * multiple
    if size is not None and size < minimum:
        raise ValueError(
            f"`tile_size` must be at least {minimum} pixels of the enlarged image for this model, but is {_shown(size)}. "
            "Leave it at its default to have it chosen."
        )
    if overlap is not None and overlap < 0:
        raise ValueError(f"`tile_overlap` must not be negative, but is {_shown(overlap)}.")
    if overlap is not None and size is not None and overlap >= size:
        raise ValueError(f"`tile_overlap` ({_shown(overlap)}) must be smaller than `tile_size` ({_shown(size)}).")
    return size, overlap


def _pixels(name: str, value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer (pixels of the enlarged image) or None, but is {_shown(value)}.")
    return int(value)


def _check_choice(name: str, value: object, choices: tuple[str, ...], also: str = "", may_be_none: bool = False) -> None:
    if value is None and may_be_none:
        return
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {_listed(choices)}{also}, but is {_shown(value)}.")


def _names(names: object, allowed: list[str]) -> tuple[str, ...]:
    name = "callback_on_step_end_tensor_inputs"
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"`{name}` must be a list that may hold {_listed(allowed)}, but is {_shown(names)}.")
    names = tuple(names)
    unknown = [one for one in names if not isinstance(one, str) or one not in allowed]
    if unknown:
        raise ValueError(f"`{name}` may hold {_listed(allowed)}, but holds {_listed(unknown)}.")
    return names


def replaced_tensors(tensors: dict[str, torch.Tensor], returned: object) -> dict[str, torch.Tensor]:
    """A tile's `tensors` with what a callback returned in their place; None leaves them as they are.

    Raises:
        TypeError, ValueError: what it returned, or changed in place, is no finite tensor of the same shape.
    """
    name = "callback_on_step_end"
    if returned is not None and not isinstance(returned, Mapping):
        raise TypeError(
            f"`{name}` must return None or a dict such as its callback_kwargs, but returned {type(returned).__name__}."
        )
    result = {key: (returned or {}).get(key, tensor) for key, tensor in tensors.items()}
    for key, tensor in result.items():
        shape = tuple(tensors[key].shape)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must return {key!r} as a tensor, but returned {type(tensor).__name__}.")
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta or tuple(tensor.shape) != shape:
            raise ValueError(
                f"`{name}` must return {key!r} as a dense float tensor of shape {shape}, but returned {tensor.dtype} of shape"
                f" {tuple(tensor.shape)}, layout {tensor.layout}, on {tensor.device}."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"`{name}` left NaN or infinity in {key!r}. The network's own result was finite.")
    return result


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(_shown, names))


def _shown(value: object) -> str:
    """Short in any case: Python refuses to print integers of more than 4300 digits, and arrays have many lines."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}.."
