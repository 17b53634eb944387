"""The model that a checkpoint adapts: Stable Diffusion's parts, read from a diffusers folder, the Hub, or a single file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from qartsr_pipeline.checkpoint_files import CheckpointError, fetch, quantization_configs
from qartsr_pipeline.checkpoint_files.checking import PIPELINE_CLASS, named_class, read_json
from qartsr_pipeline.checkpoint_files.integrity import check_safetensors
from qartsr_pipeline.text_prompt import embed_prompt

# What is downloaded of a base on the Hub: its parts, in full precision, and its card. No other variants, no single files.
PATTERNS = [
    "README.md",
    "model_index.json",
    *(f"{part}/*.{kind}" for part in ("scheduler", "tokenizer") for kind in ("json", "txt")),
    *(
        f"{part}/{name}"
        for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"), ("text_encoder", "model"))
        for name in ("config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*.safetensors")
    ),
]
_DOWNLOAD_AGAIN = "Download the base again, whole."
# Conditioning that a one-step call with nothing but a prompt cannot give.
_OTHER_CONDITIONING = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")


@dataclass
class Base:
    """A model in float32 on the CPU.

    Attributes:
        prompt_embeds: of the fixed prompt, (1, tokens, dim).
        text_encoder, tokenizer: None where the source has none.
        hub_id: where it came from if that was the Hub.
        license: as its card names it, or None.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    prompt_embeds: torch.Tensor
    text_encoder: CLIPTextModel | None = None
    tokenizer: CLIPTokenizer | None = None
    hub_id: str | None = None
    license: str | None = None


def read_base(source: str | os.PathLike, prompt_embeds: torch.Tensor | None = None) -> Base:
    """Reads a base model.

    Args:
        source: a diffusers folder, a Hub id, or a single file of Stable Diffusion 2.1 as .safetensors.
        prompt_embeds: of the fixed prompt; None to compute that of the empty prompt.

    Raises:
        CheckpointError: not there, not such a model, or not whole.
    """
    if Path(source).expanduser().is_file():
        from qartsr_pipeline.convert.single_file import read_single_file

        return read_single_file(Path(source).expanduser(), prompt_embeds)
    folder = fetch(source, patterns=PATTERNS)
    base = _read_folder(folder, prompt_embeds)
    base.hub_id = None if Path(source).expanduser().exists() else os.fspath(source)
    return base


def _read_folder(folder: Path, prompt_embeds: torch.Tensor | None) -> Base:
    for part, config in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        if not (folder / part / config).is_file():
            raise CheckpointError(
                f"{folder} lacks {part}/{config}. A base is a diffusers folder with unet, vae, scheduler, text_encoder and"
                f" tokenizer, or a single .safetensors file of Stable Diffusion 2.1."
            )
    index = folder / "model_index.json"
    if index.is_file() and named_class(read_json(index, _DOWNLOAD_AGAIN)) == PIPELINE_CLASS:
        raise CheckpointError(f"{folder} is a converted model already. Give the base that the checkpoint was trained on.")
    quantized = quantization_configs(folder)
    if quantized:
        raise CheckpointError(f"{', '.join(quantized)} in {folder} is quantized. Give the base in full precision.")
    text_encoder, tokenizer = _read_text_parts(folder, required=prompt_embeds is None)
    if prompt_embeds is None:
        prompt_embeds = embed_prompt(text_encoder, tokenizer, "")
    return Base(
        unet=_read_model(UNet2DConditionModel, folder, "unet", "diffusion_pytorch_model"),
        vae=_read_model(AutoencoderKL, folder, "vae", "diffusion_pytorch_model"),
        scheduler=read_scheduler(read_json(folder / "scheduler" / "scheduler_config.json", _DOWNLOAD_AGAIN)),
        prompt_embeds=prompt_embeds,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        license=license_of(folder / "README.md"),
    )


def _read_text_parts(folder: Path, required: bool) -> tuple[CLIPTextModel | None, CLIPTokenizer | None]:
    there = (folder / "text_encoder" / "config.json").is_file() and (folder / "tokenizer").is_dir()
    if not there and not required:
        return None, None
    if not there:
        raise CheckpointError(
            f"{folder} has no text_encoder and tokenizer, which compute the empty prompt's embedding. Give the embedding with"
            f" --prompt-embedding, or a base that has them."
        )
    config = read_json(folder / "text_encoder" / "config.json", _DOWNLOAD_AGAIN)
    if config.get("model_type") not in ("clip_text_model", "clip"):
        raise CheckpointError(
            f"text_encoder in {folder} is a {config.get('model_type')!r} model, but only CLIP's is known here."
            f" Give a base like Stable Diffusion 2.1."
        )
    tables = {path.name for path in (folder / "tokenizer").iterdir()}
    for name in () if "tokenizer.json" in tables else ("vocab.json", "merges.txt"):  # else transformers makes an empty one
        if name not in tables:
            raise CheckpointError(f"{folder} lacks tokenizer/{name}. Download the base again, whole.")
    text_encoder = _read_model(CLIPTextModel, folder, "text_encoder", "model")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"tokenizer in {folder} cannot be read ({reason}). Download the base again, whole.") from error
    return text_encoder, tokenizer


def _read_model(kind: type, folder: Path, part: str, stem: str) -> nn.Module:
    """Loads a part in float32; every tensor must be there. Weights come from safetensors files alone."""
    config = read_json(folder / part / "config.json", _DOWNLOAD_AGAIN)
    found = config.get("_class_name", kind.__name__)
    if found != kind.__name__:
        raise CheckpointError(f"{part} in {folder} is a {found}, not a {kind.__name__}. Give a base like Stable Diffusion 2.1.")
    files = sorted((folder / part).glob(f"{stem}.safetensors")) or sorted((folder / part).glob(f"{stem}-*-of-*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} lacks {part}/{stem}.safetensors. Weights are read from safetensors files alone, in full precision:"
            f" download the base again, whole, with these files."
        )
    for file in files:
        check_safetensors(file, f"{part}/{file.name} in {folder}")
    try:
        model, report = kind.from_pretrained(
            folder / part, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # besides the usual ones, what the libraries' checks of configurations raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{part} in {folder} cannot be loaded ({reason}). Download the base again, whole.") from error
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise CheckpointError(f"{part} in {folder} lacks {len(missing)} tensors, such as {missing[0]}. Download the base again.")
    surplus = sorted(map(str, report["unexpected_keys"])) if kind is not CLIPTextModel else []  # CLIP's have known leftovers
    if surplus:
        raise CheckpointError(
            f"{part} in {folder} has {len(surplus)} tensors that its config.json has no place for, such as {surplus[0]}: the two"
            " are of different models. Download the base again, whole."
        )
    if kind is UNet2DConditionModel:
        check_unet(model, f"unet in {folder}")
    return model.eval().requires_grad_(False)


def check_unet(unet: UNet2DConditionModel, label: str) -> None:
    """Raises CheckpointError when the UNet needs more than a latent, a timestep and a prompt."""
    config = unet.config
    other = [name for name in _OTHER_CONDITIONING if config.get(name) is not None]
    if other or config.in_channels != config.out_channels:
        reason = f"it is conditioned on more than a prompt ({other[0]})" if other else "it does not return as many channels"
        raise CheckpointError(f"{label} cannot be used for one-step super-resolution: {reason}. Take Stable Diffusion 2.1-base.")


def read_scheduler(config: dict[str, Any]) -> DDPMScheduler:
    """The noise schedule of any scheduler's configuration; which step rule it names does not matter for one step."""
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    chosen = {name: config[name] for name in (*names, "rescale_betas_zero_snr") if name in config}
    try:
        return DDPMScheduler(**chosen, clip_sample=False)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"the base's scheduler_config.json makes no schedule ({error}). {_DOWNLOAD_AGAIN}") from error


def license_of(card: Path) -> str | None:
    """The licence that a model card's header names."""
    if not card.is_file():
        return None
    header = card.read_text(encoding="utf-8", errors="replace").split("---")
    lines = header[1].splitlines() if len(header) > 2 and not header[0].strip() else []
    values = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return values[0].strip("'\"") or None if values else None
