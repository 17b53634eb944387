"""From a base, and for OSEDiff its checkpoint, to a written folder: what the two forms of `qartsr convert` do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.convert.adapters import Merged
from qartsr_pipeline.convert.base import Base, read_base
from qartsr_pipeline.convert.model_card import STABLE_DIFFUSION, STABLE_DIFFUSION_LICENSE, Card
from qartsr_pipeline.convert.osediff import SCALE, TIMESTEP, read_checkpoint
from qartsr_pipeline.convert.output_folder import check_output, write_folder
from qartsr_pipeline.convert.pickles import read_prompt_embedding
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding

_OSEDIFF_ORIGIN = (
    "Converted from the weights of OSEDiff (arXiv 2406.08177): its adapters for {layers} layers of the UNet and {vae_layers} of"
    " the VAE's encoder, merged into Stable Diffusion 2.1-base."
)
_DIFFUSERS_ORIGIN = "Converted from a diffusers folder whose weights were taken as they are."


Told = Callable[[str], None]


def _nobody(step: str) -> None:
    pass


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        size: bytes.
        merged: by component, for OSEDiff.
        takes_prompts: the folder holds text encoder and tokenizer.
    """

    folder: Path
    size: int
    merged: dict[str, Merged]
    takes_prompts: bool


def convert_osediff(
    base: str | os.PathLike,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    prompt_embedding: str | os.PathLike | None,
    told: Told = _nobody,
) -> Converted:
    """OSEDiff's (or PassionSR's) checkpoint and its base become a `QArtSRPipeline` folder.

    Args:
        base: see `base.read_base`.
        checkpoint: osediff.pkl or osediff.ckpt.
        output: the folder to write; new or empty.
        prompt_embedding: file with the fixed prompt's embedding; None to compute that of the empty prompt.
        told: called with what comes next, before every step; what it raises ends the conversion, and nothing is written.

    Raises:
        CheckpointError: one of the inputs cannot be used. OSError: the folder cannot be written.
    """
    check_output(Path(output))
    embeds = None if prompt_embedding is None else read_prompt_embedding(prompt_embedding)
    told(f"reading {checkpoint}")
    adapters = read_checkpoint(checkpoint)
    told(f"reading {base}")
    model = read_base(base, embeds)
    told("merging the adapters")
    merged = adapters.merge_into(model)
    origin = _OSEDIFF_ORIGIN.format(layers=merged["unet"].layers, vae_layers=merged["vae"].layers)
    license_ = model.license or STABLE_DIFFUSION_LICENSE
    told(f"writing {output}")
    return _write(model, Path(output), origin, license_, model.hub_id or STABLE_DIFFUSION, TIMESTEP, SCALE, merged)


def convert_diffusers(
    base: str | os.PathLike,
    output: str | os.PathLike,
    prompt_embedding: str | os.PathLike | None,
    timestep: int = TIMESTEP,
    scale: int = SCALE,
    told: Told = _nobody,
) -> Converted:
    """A one-step model stored as a plain Stable Diffusion pipeline becomes a `QArtSRPipeline` folder, weights unchanged.

    Args:
        timestep: T, the one timestep it was trained at.
        scale: the enlargement it was trained at.
        base, output, prompt_embedding, told: as in `convert_osediff`, with the same errors.
    """
    check_output(Path(output))
    embeds = None if prompt_embedding is None else read_prompt_embedding(prompt_embedding)
    told(f"reading {base}")
    model = read_base(base, embeds)
    told(f"writing {output}")
    return _write(model, Path(output), _DIFFUSERS_ORIGIN, model.license or "other", model.hub_id, timestep, scale, {})


def _write(
    model: Base,
    output: Path,
    origin: str,
    license_: str,
    base_model: str | None,
    timestep: int,
    scale: int,
    merged: dict[str, Merged],
) -> Converted:
    try:
        pipeline = QArtSRPipeline(
            unet=model.unet,
            vae=model.vae,
            scheduler=model.scheduler,
            prompt_embedding=PromptEmbedding.from_tensor(model.prompt_embeds),
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            timestep=timestep,
            scale=scale,
        )
    except ValueError as error:
        raise CheckpointError(f"The base cannot be used: {error}") from error
    takes_prompts = model.text_encoder is not None
    card = Card(output.absolute().name, origin, license_, base_model, takes_prompts, timestep, scale)
    return Converted(output, write_folder(pipeline, output, card), merged, takes_prompts)
