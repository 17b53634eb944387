"""Makes a `LSGQuantVideoPipeline` folder from a one-step WAN model: a diffusers folder, or single files with the original names.

diffusers translates the names, and the structure is read off the tensors' shapes, so nothing is downloaded. What is not stored in
a transformer's shapes is as in WAN 2.1: heads of 128, and the autoencoder's four levels and latent statistics.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file

from qartsr_pipeline.checkpoint_files import CheckpointError, fetch, quantization_configs
from qartsr_pipeline.checkpoint_files.integrity import read_json
from qartsr_pipeline.checkpoint_files.weight_files import check_safetensors
from qartsr_pipeline.convert.adapters import Merged
from qartsr_pipeline.convert.conversion import Converted, check_output, write_folder
from qartsr_pipeline.convert.diffusers_folder import DOWNLOAD_AGAIN, read_model
from qartsr_pipeline.convert.model_card import Card, license_of
from qartsr_pipeline.convert.osediff import FLOATS, read_pickle, read_prompt_embedding
from qartsr_pipeline.convert.single_file import assign
from qartsr_pipeline.convert.wan_adapters import merge_lora
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.versions import import_transformers

TIMESTEP, SCALE = 399, 4  # of DOVE's recipe, which LSGQuant's backbone was trained by
HEAD = 128  # width of one attention head in every WAN model
TOKENS = 512  # that WAN's prompts are padded to, with zeros
TRAIN_TIMESTEPS = 1000
_STEM = "diffusion_pytorch_model"
PATTERNS = [
    *("README.md", "model_index.json", "scheduler/*.json", "prompt_embeddings/*.safetensors"),
    *(f"{part}/{name}" for part in ("transformer", "vae") for name in ("config.json", f"{_STEM}*.safetensors", "*.index.json")),
]
_LIKE = "WAN 2.1 (T2V)"
_ORIGIN = "Converted from {what}.{lora} The autoencoder and the transformer are WAN's (arXiv 2503.20314)."


@dataclass
class WanBase:
    """A model in float32 on the CPU.

    Attributes:
        prompt_embeds: (1, tokens, dim).
        num_train_timesteps: of its noise schedule.
        license: as its model card names it, or None.
    """

    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    prompt_embeds: torch.Tensor
    num_train_timesteps: int = TRAIN_TIMESTEPS
    license: str | None = None


def convert_wan(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    vae: str | os.PathLike[str] | None = None,
    lora: str | os.PathLike[str] | None = None,
    prompt_embedding: str | os.PathLike[str] | torch.Tensor | None = None,
    timestep: int = TIMESTEP,
    scale: int = SCALE,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Makes a `LSGQuantVideoPipeline` folder from a one-step WAN model.

    Args:
        base: a diffusers folder or Hub id with `transformer` and `vae`, or a transformer's single .safetensors file.
        output: the folder to write; new or empty.
        vae: the autoencoder's single file, .safetensors or WAN's own .pth; with a single file as `base`, it must be given.
        lora: .safetensors file of adapters of the transformer, which are merged.
        prompt_embedding: file with the embedding of the fixed prompt, or the embedding (1, tokens, dim) itself. None for what
            `prompt_embeddings/` in the folder holds, or for that of the empty prompt, if the folder has a text encoder.
        timestep, scale: T, the one timestep it was trained at, and its enlargement.
        progress: as in `convert_osediff`.

    Raises:
        CheckpointError: one of the inputs cannot be used. OSError: the folder cannot be written.
    """
    report = progress or (lambda step: None)
    check_output(Path(output))
    embeds = None if prompt_embedding is None else read_prompt_embedding(prompt_embedding)
    report(f"reading {base}")
    model = read_wan(base, vae, embeds)
    merged = {}
    if lora is not None:
        report(f"merging {lora}")
        merged["transformer"] = Merged(merge_lora(model.transformer, Path(lora)), ())
    try:
        pipeline = LSGQuantVideoPipeline(
            transformer=model.transformer,
            vae=model.vae,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=model.num_train_timesteps),
            prompt_embedding=PromptEmbedding.from_tensor(model.prompt_embeds),
            timestep=timestep,
            scale=scale,
        )
    except ValueError as error:
        raise CheckpointError(f"The base cannot be used: {error}") from error
    report(f"writing {output}")
    what = "a diffusers folder" if Path(base).is_dir() or not Path(base).exists() else "single files with WAN's original names"
    card = Card(
        title=Path(output).absolute().name,
        origin=_ORIGIN.format(
            what=what, lora=f" Adapters of {merged['transformer'].layers} layers were merged." if merged else ""
        ),
        license=model.license or "other",
        base_model=None if Path(base).exists() else os.fspath(base),
        takes_prompts=False,
        timestep=timestep,
        scale=scale,
        video=True,
    )
    return Converted(Path(output), write_folder(pipeline, Path(output), card), merged, takes_prompts=False)


def read_wan(
    base: str | os.PathLike[str], vae: str | os.PathLike[str] | None = None, prompt_embeds: torch.Tensor | None = None
) -> WanBase:
    """Reads transformer and autoencoder; see `convert_wan`."""
    path = Path(base).expanduser()
    if not path.is_file():
        return _read_folder(fetch(base, patterns=PATTERNS), vae, prompt_embeds)
    if vae is None:
        raise CheckpointError(f"{path} holds a transformer alone. Give WAN's autoencoder, too: --vae wan_2.1_vae.safetensors.")
    if prompt_embeds is None:
        raise CheckpointError(f"{path} holds no prompt. {_GIVE_PROMPT}")
    return WanBase(read_transformer(path), read_vae(Path(vae).expanduser()), prompt_embeds)


_GIVE_PROMPT = (
    "Give the embedding of the prompt that the model was trained with (1, tokens, 4096 numbers each): --prompt-embedding FILE, as"
    " .safetensors or .pt."
)


def _read_folder(folder: Path, vae: str | os.PathLike[str] | None, prompt_embeds: torch.Tensor | None) -> WanBase:
    for part in ("transformer", *(() if vae else ("vae",))):
        if not (folder / part / "config.json").is_file():
            raise CheckpointError(
                f"{folder} lacks {part}/config.json. A base is a diffusers folder with transformer and vae of WAN, or a"
                " transformer's single .safetensors file."
            )
    kind = read_json(folder / "transformer" / "config.json", remedy=DOWNLOAD_AGAIN).get("_class_name", "")
    if str(kind).startswith("CogVideoX"):
        raise CheckpointError(
            f"{folder} holds a CogVideoX model, such as DOVE. It predicts v of a DDPM schedule and has an autoencoder of its own,"
            " neither of which LSGQuantVideoPipeline computes: that takes models of WAN, which are trained by flow matching. Use"
            " DOVE's own code for it."
        )
    quantized = quantization_configs(folder)
    if quantized:
        raise CheckpointError(f"{', '.join(quantized)} in {folder} is quantized. Give the model in full precision.")
    if prompt_embeds is None:
        prompt_embeds = _stored_prompt(folder)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = read_json(scheduler, remedy=DOWNLOAD_AGAIN) if scheduler.is_file() else {}
    return WanBase(
        read_model(WanTransformer3DModel, folder, "transformer", _STEM, _LIKE),
        read_model(AutoencoderKLWan, folder, "vae", _STEM, _LIKE) if vae is None else read_vae(Path(vae).expanduser()),
        prompt_embeds,
        config.get("num_train_timesteps", TRAIN_TIMESTEPS),
        license_of(folder / "README.md"),
    )


def _stored_prompt(folder: Path) -> torch.Tensor:
    """What `prompt_embeddings/` holds, as DOVE's folders have it, or the empty prompt's embedding."""
    files = sorted((folder / "prompt_embeddings").glob("*.safetensors"))
    if len(files) > 1:
        raise CheckpointError(
            f"{folder}/prompt_embeddings holds {len(files)} embeddings. Name the one to use: --prompt-embedding {files[0]}."
        )
    if files:
        return read_prompt_embedding(files[0])
    if not ((folder / "text_encoder" / "config.json").is_file() and (folder / "tokenizer").is_dir()):
        raise CheckpointError(f"{folder} has neither prompt_embeddings/ nor text_encoder and tokenizer. {_GIVE_PROMPT}")
    return _empty_prompt(folder)


@torch.no_grad()
def _empty_prompt(folder: Path) -> torch.Tensor:
    """As diffusers' WanPipeline embeds a prompt: what follows its last token is zero."""
    transformers = import_transformers(f"The text encoder in {folder}", "Or give --prompt-embedding.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True).eval()
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"text_encoder or tokenizer in {folder} cannot be read ({reason}). {_GIVE_PROMPT}") from error
    tokens = tokenizer([""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    embeds = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state.float()
    return embeds * tokens.attention_mask[..., None]


def read_transformer(path: Path) -> WanTransformer3DModel:
    """A transformer's single file with WAN's names, as WAN's authors or ComfyUI have it (with or without their prefixes).

    Raises:
        CheckpointError: not such a file, or not a complete one.
    """
    tensors = {re.sub(r"^(model\.)?diffusion_model\.", "", name): tensor for name, tensor in _tensors_of(path).items()}
    if "patch_embedding.weight" not in tensors or "head.head.weight" not in tensors:
        raise CheckpointError(f"{path} holds no transformer under WAN's original names (patch_embedding, blocks, head). {_OTHER}")
    if any("img_emb" in name or "k_img" in name for name in tensors):
        raise CheckpointError(f"{path} is an image-to-video model. One-step super-resolution needs a text-to-video one.")
    try:
        config = _transformer_config(tensors)
        with init_empty_weights():
            model = WanTransformer3DModel(**config)
        translated = convert_wan_transformer_to_diffusers(tensors)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path} is not a complete transformer ({error}). {_OTHER}") from error
    return assign(model, translated, path, _OTHER)


_OTHER = "Give a text-to-video transformer of WAN 2.1 in full precision, such as wan2.1_t2v_1.3B_fp16.safetensors."
_OTHER_VAE = "Give WAN 2.1's autoencoder, wan_2.1_vae.safetensors or Wan2.1_VAE.pth."


def _transformer_config(tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """What the shapes say."""
    width, channels, *patch = tensors["patch_embedding.weight"].shape
    blocks = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    if width % HEAD:
        raise ValueError(f"its width of {width} is no multiple of {HEAD}")
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": width // HEAD,
        "attention_head_dim": HEAD,
        "in_channels": channels,
        "out_channels": tensors["head.head.weight"].shape[0] // prod(patch),
        "text_dim": tensors["text_embedding.0.weight"].shape[1],
        "freq_dim": tensors["time_embedding.0.weight"].shape[1],
        "ffn_dim": tensors["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": max(blocks) + 1,
        "cross_attn_norm": "blocks.0.norm3.weight" in tensors,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.self_attn.norm_q.weight" in tensors else None,
    }


def read_vae(path: Path) -> AutoencoderKLWan:
    """WAN 2.1's autoencoder from a single file with the original names.

    Raises:
        CheckpointError: not such a file, or not a complete one.
    """
    tensors = _tensors_of(path)
    if "encoder.conv1.weight" not in tensors or "conv2.weight" not in tensors:
        raise CheckpointError(f"{path} holds no autoencoder under WAN's original names. {_OTHER_VAE}")
    with init_empty_weights():
        model = AutoencoderKLWan(base_dim=tensors["encoder.conv1.weight"].shape[0])
    channels = tensors["conv2.weight"].shape[0]
    if channels != model.config["z_dim"]:
        raise CheckpointError(
            f"{path} has {channels} latent channels, and WAN 2.1's autoencoder {model.config['z_dim']}. Give one of another shape"
            " as the folder `vae` of a diffusers folder, whose config.json describes it."
        )
    return assign(model, convert_wan_vae_to_diffusers(tensors), path, _OTHER_VAE)


def _tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by their names."""
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Check its name.")
    if path.suffix == ".safetensors":
        check_safetensors(path, str(path))
        tensors = load_file(path)
    else:
        tensors = read_pickle(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path} is no table of tensors. Take the file as the model's authors published it.")
    narrow = next((name for name, tensor in tensors.items() if tensor.dtype not in FLOATS), None)
    if narrow is not None:
        raise CheckpointError(
            f"{path} is quantized: {narrow} is stored as {str(tensors[narrow].dtype).removeprefix('torch.')}. Give the file of 16"
            " or 32 bits."
        )
    return tensors
