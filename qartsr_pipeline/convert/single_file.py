"""Reads Stable Diffusion 2.1 from one .safetensors file with the original names, such as v2-1_512-ema-pruned.safetensors.

diffusers translates the names. The structure is known (stable_diffusion_2_1.py), so nothing is downloaded. Such a file has no
tokenizer: the empty prompt's embedding is computed from its known tokens, and the text encoder is not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models import AutoencoderKL, AutoencoderKLWan, UNet2DConditionModel, WanTransformer3DModel
from safetensors.torch import load_file

from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.checkpoint_files.weight_files import check_safetensors
from qartsr_pipeline.convert import stable_diffusion_2_1 as sd21
from qartsr_pipeline.convert.diffusers_folder import Base, read_scheduler
from qartsr_pipeline.prompt_embedding import embed_tokens
from qartsr_pipeline.versions import import_transformers

if TYPE_CHECKING:
    from transformers import CLIPTextModel

Model = TypeVar("Model", UNet2DConditionModel, AutoencoderKL, WanTransformer3DModel, AutoencoderKLWan, "CLIPTextModel")
UNET_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."


@dataclass(frozen=True)
class Structure:
    """Configurations of the parts, and the padded tokens of the empty prompt."""

    unet: dict[str, Any] = field(default_factory=lambda: sd21.UNET)
    vae: dict[str, Any] = field(default_factory=lambda: sd21.VAE)
    text_encoder: dict[str, Any] = field(default_factory=lambda: sd21.TEXT_ENCODER)
    start_token: int = sd21.START_TOKEN
    end_token: int = sd21.END_TOKEN

    def empty_prompt(self) -> torch.Tensor:
        """Token ids (1, tokens), int64."""
        tokens = torch.full((1, self.text_encoder["max_position_embeddings"]), sd21.PADDING_TOKEN)
        tokens[0, 0], tokens[0, 1] = self.start_token, self.end_token
        return tokens


def read_single_file(path: Path, prompt_embeds: torch.Tensor | None = None, structure: Structure | None = None) -> Base:
    """Reads the file, and nothing else.

    Args:
        prompt_embeds: of the fixed prompt; None to compute that of the empty prompt.
        structure: None for Stable Diffusion 2.1-base.

    Raises:
        CheckpointError: not such a file, or not a complete one.
    """
    structure = structure or Structure()
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a .safetensors file. Pickled bases are refused, because opening them can run code: take the"
            f" .safetensors of the same model."
        )
    check_safetensors(path, str(path))
    tensors = load_file(path)
    for prefix, part in ((UNET_PREFIX, "UNet"), (VAE_PREFIX, "VAE")):
        if not any(name.startswith(prefix) for name in tensors):
            raise CheckpointError(
                f"{path} holds no {part} under the names of Stable Diffusion's original files ({prefix}..). Give the whole"
                f" model's file, or a diffusers folder."
            )
    if prompt_embeds is None:
        prompt_embeds = embed_tokens(_text_encoder(path, tensors, structure), structure.empty_prompt())
    unet = _filled(UNet2DConditionModel, structure.unet, convert_ldm_unet_checkpoint, tensors, path)
    vae = _filled(AutoencoderKL, structure.vae, convert_ldm_vae_checkpoint, tensors, path)
    return Base(unet, vae, read_scheduler(sd21.SCHEDULER), prompt_embeds)


def _filled(
    kind: type[Model],
    config: dict[str, Any],
    convert: Callable[..., dict[str, torch.Tensor]],
    tensors: dict[str, torch.Tensor],
    path: Path,
) -> Model:
    with init_empty_weights():
        model = kind(**config)
    try:
        translated = convert(dict(tensors), config=model.config)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error.args[0]}: {_OTHER_MODEL}") from error
    return assign(model, translated, path, _OTHER_MODEL)


def _text_encoder(path: Path, tensors: dict[str, torch.Tensor], structure: Structure) -> CLIPTextModel:
    if not any(name.startswith(TEXT_PREFIX) for name in tensors):
        raise CheckpointError(
            f"{path} holds no text encoder ({TEXT_PREFIX}..), which computes the empty prompt's embedding. Give the embedding"
            f" with --prompt-embedding."
        )
    transformers = import_transformers(f"The text encoder in {path}", "Or give the prompt's embedding with --prompt-embedding.")
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**structure.text_encoder))
    translated = convert_open_clip_checkpoint(model, tensors, TEXT_PREFIX)
    names = model.state_dict().keys()
    # Releases of transformers before 5.6 have one more level of names.
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    translated = {prefix + name.removeprefix("text_model."): tensor for name, tensor in translated.items()}
    return assign(model, {name: tensor for name, tensor in translated.items() if name in names}, path, _OTHER_MODEL)


_OTHER_MODEL = "it is not a file of Stable Diffusion 2.1. Give v2-1_512-ema-pruned.safetensors or a diffusers folder."


def assign(model: Model, tensors: dict[str, torch.Tensor], path: Path, other_model: str) -> Model:
    """Gives the model float32 copies of the tensors, which must be complete and of the right shapes.

    Args:
        other_model: the last sentence of messages: that it is another model, and which one to give.
    """
    wanted = model.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(tensors.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & tensors.keys() if wanted[name].shape != tensors[name].shape)
    for kind, names in (("lacks", missing), ("has beyond what is known", extra), ("has in another shape", wrong)):
        if names:
            raise CheckpointError(f"{path} {kind} {names[0]} ({len(names)} such tensors): {other_model}")
    model.load_state_dict({name: tensors[name].float() for name in wanted}, assign=True)
    return model.eval().requires_grad_(False)
