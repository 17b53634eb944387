"""The model that a checkpoint adapts: the parts of a Stable Diffusion model, however they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDPMScheduler
from transformers import CLIPTextModel, CLIPTokenizer

from qartsr_pipeline.checkpoint_files import CheckpointError


@dataclass
class Base:
    """A model in float32 on the CPU.

    Attributes:
        prompt_embeds: embedding of the fixed prompt, (1, tokens, dim).
        text_encoder, tokenizer: None where the source has none.
        hub_id: of its repository on the Hub; None if it came from a local file or folder.
        license: as its model card names it, or None.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    prompt_embeds: torch.Tensor
    text_encoder: CLIPTextModel | None = None
    tokenizer: CLIPTokenizer | None = None
    hub_id: str | None = None
    license: str | None = None


def read_scheduler(config: dict[str, Any]) -> DDPMScheduler:
    """The noise schedule that any scheduler's configuration describes; its step rule does not matter for one step.

    Raises:
        CheckpointError: the configuration describes no schedule.
    """
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    chosen = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if name in config}
    try:
        return DDPMScheduler(**chosen, clip_sample=False)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"the base's scheduler_config.json makes no schedule ({error}). Download the base again, whole."
        ) from error
