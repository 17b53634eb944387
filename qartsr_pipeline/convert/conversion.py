"""Makes a checkpoint folder from published weights: the two forms of `qartsr convert`.

The folder is written under a temporary name and renamed, so a folder that exists is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from qartsr_pipeline.checkpoint_files import CheckpointError, fetch
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.convert.adapters import Merged
from qartsr_pipeline.convert.diffusers_folder import PATTERNS, Base, read_diffusers_folder
from qartsr_pipeline.convert.model_card import STABLE_DIFFUSION, STABLE_DIFFUSION_LICENSE, Card
from qartsr_pipeline.convert.osediff import SCALE, TIMESTEP, read_checkpoint, read_prompt_embedding
from qartsr_pipeline.convert.single_file import read_single_file
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.whole_files import temporary_folder

_OSEDIFF_ORIGIN = (
    "Converted from the weights of OSEDiff (arXiv 2406.08177): its adapters for {layers} layers of the UNet and {vae_layers} of"
    " the VAE's encoder, merged into Stable Diffusion 2.1-base."
)
_DIFFUSERS_ORIGIN = "Converted from a diffusers folder, whose weights were not changed."


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        size: bytes.
        merged: the merged adapters of each component; empty if there were none.
        takes_prompts: whether the folder holds a text encoder and a tokenizer.
    """

    folder: Path
    size: int
    merged: dict[str, Merged]
    takes_prompts: bool


def convert_osediff(
    base: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    prompt_embedding: str | os.PathLike[str] | torch.Tensor | None = None,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Makes a `QArtSRPipeline` folder from OSEDiff's (or PassionSR's) checkpoint and its base.

    Args:
        base: see `read_base`.
        checkpoint: osediff.pkl or osediff.ckpt.
        output: the folder to write; new or empty.
        prompt_embedding: file with the embedding of the fixed prompt, or the embedding (1, tokens, dim) itself; None to compute
            that of the empty prompt.
        progress: called before every step with its description. An error that it raises ends the conversion before anything is
            written.

    Raises:
        CheckpointError: one of the inputs cannot be used. OSError: the folder cannot be written.
    """
    report = progress or _ignore
    check_output(Path(output))
    embeds = None if prompt_embedding is None else read_prompt_embedding(prompt_embedding)
    report(f"reading {checkpoint}")
    adapters = read_checkpoint(checkpoint)
    report(f"reading {base}")
    model = read_base(base, embeds)
    report("merging the adapters")
    merged = adapters.merge_into(model)
    report(f"writing {output}")
    card = Card(
        title=Path(output).absolute().name,
        origin=_OSEDIFF_ORIGIN.format(layers=merged["unet"].layers, vae_layers=merged["vae"].layers),
        license=model.license or STABLE_DIFFUSION_LICENSE,
        base_model=model.hub_id or STABLE_DIFFUSION,
        takes_prompts=model.text_encoder is not None,
        timestep=TIMESTEP,
        scale=SCALE,
    )
    return _write(model, Path(output), card, merged)


def convert_diffusers(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    prompt_embedding: str | os.PathLike[str] | torch.Tensor | None = None,
    timestep: int = TIMESTEP,
    scale: int = SCALE,
    progress: Callable[[str], None] | None = None,
) -> Converted:
    """Makes a `QArtSRPipeline` folder from a one-step model stored as a plain Stable Diffusion pipeline, weights unchanged.

    Args:
        timestep: T, the one timestep it was trained at.
        scale: the enlargement it was trained at.
        base, output, prompt_embedding, progress: as in `convert_osediff`, with the same errors.
    """
    report = progress or _ignore
    check_output(Path(output))
    embeds = None if prompt_embedding is None else read_prompt_embedding(prompt_embedding)
    report(f"reading {base}")
    model = read_base(base, embeds)
    report(f"writing {output}")
    card = Card(
        title=Path(output).absolute().name,
        origin=_DIFFUSERS_ORIGIN,
        license=model.license or "other",
        base_model=model.hub_id,
        takes_prompts=model.text_encoder is not None,
        timestep=timestep,
        scale=scale,
    )
    return _write(model, Path(output), card, {})


def _ignore(step: str) -> None:
    """The progress callback of a caller that wants none."""


def read_base(source: str | os.PathLike[str], prompt_embeds: torch.Tensor | None = None) -> Base:
    """Reads a base model.

    Args:
        source: a diffusers folder, a Hub id, or a single .safetensors file of Stable Diffusion 2.1.
        prompt_embeds: of the fixed prompt; None to compute that of the empty prompt.

    Raises:
        CheckpointError: not found, not such a model, or not complete.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return read_single_file(path, prompt_embeds)
    model = read_diffusers_folder(fetch(source, patterns=PATTERNS), prompt_embeds)
    model.hub_id = None if path.exists() else os.fspath(source)
    return model


def _write(model: Base, output: Path, card: Card, merged: dict[str, Merged]) -> Converted:
    try:
        pipeline = QArtSRPipeline(
            unet=model.unet,
            vae=model.vae,
            scheduler=model.scheduler,
            prompt_embedding=PromptEmbedding.from_tensor(model.prompt_embeds),
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            timestep=card.timestep,
            scale=card.scale,
        )
    except ValueError as error:
        raise CheckpointError(f"The base cannot be used: {error}") from error
    return Converted(output, write_folder(pipeline, output, card), merged, card.takes_prompts)


_MARGIN = 16_000_000  # bytes for all files that hold no weights


def check_output(folder: Path) -> None:
    """Raises FileExistsError if `folder` exists and is not empty, NotADirectoryError if it cannot be created."""
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and is not empty, so it was not changed. Choose another name or remove it.")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Choose another name for the folder.")
    if os.path.ismount(folder):
        raise FileExistsError(f"{folder} is the root of another disk and cannot be replaced. Give a folder within it.")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{folder} cannot be created: {above} is a file. Choose another name.")


def write_folder(pipeline: CheckpointPipeline, folder: Path, card: Card) -> int:
    """Saves the pipeline and its card; returns the bytes written.

    Raises:
        FileExistsError, NotADirectoryError: see `check_output`.
        OSError: no space, or no permission; nothing is left behind.
    """
    check_output(folder)
    folder = folder.resolve()  # a link to the folder stays a link
    folder.parent.mkdir(parents=True, exist_ok=True)
    _check_space(pipeline, folder)
    temporary = temporary_folder(folder)
    try:
        pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card.text(), encoding="utf-8")
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
        if folder.is_dir():
            folder.rmdir()  # empty, or this fails; not every system renames onto a folder
        os.replace(temporary, folder)
    except SafetensorError as error:  # safetensors' error for a full disk
        raise OSError(f"{folder} could not be written ({error}). Free some space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return size


def _check_space(pipeline: CheckpointPipeline, folder: Path) -> None:
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    needed = sum(p.numel() * p.element_size() for model in models for p in model.state_dict().values()) + _MARGIN
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(
            f"{folder} needs {needed / 1e9:.2f} GB, but {folder.parent} has {free / 1e9:.2f} GB free. Free some space or choose"
            f" another place."
        )
