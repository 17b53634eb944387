"""The base model that a checkpoint adapts, and how it is read from a folder in diffusers' layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from diffusers.models import AutoencoderKL, AutoencoderKLWan, UNet2DConditionModel, WanTransformer3DModel
from diffusers.schedulers import DDPMScheduler

from qartsr_pipeline.checkpoint_files import CheckpointError, quantization_configs
from qartsr_pipeline.checkpoint_files.checking import PIPELINE_CLASS, check_numbers, named_class
from qartsr_pipeline.checkpoint_files.integrity import read_json
from qartsr_pipeline.checkpoint_files.weight_files import stored_tensors
from qartsr_pipeline.convert.model_card import license_of
from qartsr_pipeline.prompt_embedding import embed_prompt
from qartsr_pipeline.versions import dtype_argument, import_transformers

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


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


# The files of a repository on the Hub that are read: parts in full precision and the card, no variants, no single files.
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
DOWNLOAD_AGAIN = "Download the base again, whole."
# Settings of a UNet that needs more than a latent, a timestep and a prompt.
_OTHER_CONDITIONING = ("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type")

Model = TypeVar("Model", UNet2DConditionModel, AutoencoderKL, WanTransformer3DModel, AutoencoderKLWan, "CLIPTextModel")


def read_diffusers_folder(folder: Path, prompt_embeds: torch.Tensor | None = None) -> Base:
    """Reads unet, vae and scheduler, and text_encoder and tokenizer where they are there.

    Args:
        prompt_embeds: of the fixed prompt; None to compute that of the empty prompt.

    Raises:
        CheckpointError: not such a folder, or not a complete one.
    """
    for part, config in (("unet", "config.json"), ("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        if not (folder / part / config).is_file():
            raise CheckpointError(
                f"{folder} lacks {part}/{config}. A base is a diffusers folder with unet, vae, scheduler, text_encoder and"
                f" tokenizer, or a single .safetensors file of Stable Diffusion 2.1."
            )
    index = folder / "model_index.json"
    if index.is_file() and named_class(read_json(index, remedy=DOWNLOAD_AGAIN)) == PIPELINE_CLASS:
        raise CheckpointError(f"{folder} is a converted model already. Give the base that the checkpoint was trained on.")
    quantized = quantization_configs(folder)
    if quantized:
        raise CheckpointError(f"{', '.join(quantized)} in {folder} is quantized. Give the base in full precision.")
    text_encoder, tokenizer = _read_text_parts(folder, required=prompt_embeds is None)
    if prompt_embeds is None:
        assert text_encoder is not None and tokenizer is not None  # they were required
        prompt_embeds = embed_prompt(text_encoder, tokenizer, "")
    unet = read_model(UNet2DConditionModel, folder, "unet", "diffusion_pytorch_model")
    check_unet(unet, f"unet in {folder}")
    return Base(
        unet=unet,
        vae=read_model(AutoencoderKL, folder, "vae", "diffusion_pytorch_model"),
        scheduler=read_scheduler(_read_scheduler_config(folder)),
        prompt_embeds=prompt_embeds,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        license=license_of(folder / "README.md"),
    )


def _read_scheduler_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path, remedy=DOWNLOAD_AGAIN)
    check_numbers(config, str(path))
    return config


def _read_text_parts(folder: Path, required: bool) -> tuple[CLIPTextModel | None, CLIPTokenizer | None]:
    complete = (folder / "text_encoder" / "config.json").is_file() and (folder / "tokenizer").is_dir()
    if not complete and not required:
        return None, None
    if not complete:
        raise CheckpointError(
            f"{folder} has no text_encoder and tokenizer, which compute the empty prompt's embedding. Give the embedding with"
            f" --prompt-embedding, or a base that has them."
        )
    config = read_json(folder / "text_encoder" / "config.json", remedy=DOWNLOAD_AGAIN)
    if config.get("model_type") not in ("clip_text_model", "clip"):
        raise CheckpointError(
            f"text_encoder in {folder} is a {config.get('model_type')!r} model, but only CLIP's is known here."
            f" Give a base like Stable Diffusion 2.1."
        )
    tables = {path.name for path in (folder / "tokenizer").iterdir()}
    for name in (
        () if "tokenizer.json" in tables else ("vocab.json", "merges.txt")
    ):  # without them transformers makes an empty one
        if name not in tables:
            raise CheckpointError(f"{folder} lacks tokenizer/{name}. Download the base again, whole.")
    transformers = import_transformers(
        f"text_encoder in {folder}", "Or leave text_encoder and tokenizer out of the folder, and give --prompt-embedding."
    )
    text_encoder = read_model(transformers.CLIPTextModel, folder, "text_encoder", "model")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"tokenizer in {folder} cannot be read ({reason}). Download the base again, whole.") from error
    return text_encoder, tokenizer


def read_model(kind: type[Model], folder: Path, part: str, stem: str, like: str = "Stable Diffusion 2.1") -> Model:
    """Loads a part in float32 from its safetensors files, which must hold every tensor.

    Args:
        stem: of the names of these files.
        like: what a base is, for messages.

    Raises:
        CheckpointError: it is of another class, damaged or not complete.
    """
    config = read_json(folder / part / "config.json", remedy=DOWNLOAD_AGAIN)
    found = config.get("_class_name", kind.__name__)
    if found != kind.__name__:
        raise CheckpointError(f"{part} in {folder} is a {found}, not a {kind.__name__}. Give a base like {like}.")
    check_numbers(config, f"{part}/config.json in {folder}")
    stored_tensors(folder, part, stem)
    try:
        loaded = kind.from_pretrained(
            folder / part,
            **dtype_argument(kind, torch.float32),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # besides the usual ones, what the libraries' checks of configurations raise
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{part} in {folder} cannot be loaded ({reason}). Download the base again, whole.") from error
    model, report = cast(tuple[Model, dict[str, list[str]]], loaded)
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise CheckpointError(f"{part} in {folder} lacks {len(missing)} tensors, such as {missing[0]}. Download the base again.")
    surplus = sorted(map(str, report["unexpected_keys"])) if part != "text_encoder" else []  # CLIP's have known leftovers
    if surplus:
        raise CheckpointError(
            f"{part} in {folder} has {len(surplus)} tensors that its config.json has no place for, such as {surplus[0]}: the two"
            " are of different models. Download the base again, whole."
        )
    return model.eval().requires_grad_(False)


def check_unet(unet: UNet2DConditionModel, label: str) -> None:
    """Raises CheckpointError when the UNet needs more than a latent, a timestep and a prompt."""
    config = unet.config
    other = [name for name in _OTHER_CONDITIONING if config.get(name) is not None]
    if other or config["in_channels"] != config["out_channels"]:
        reason = f"it is conditioned on more than a prompt ({other[0]})" if other else "it does not return as many channels"
        raise CheckpointError(f"{label} cannot be used for one-step super-resolution: {reason}. Take Stable Diffusion 2.1-base.")
