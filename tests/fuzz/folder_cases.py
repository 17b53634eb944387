"""Mutated checkpoint folders: each is refused clearly and at once, or gives the image of the sound folder.

A mutation of content keeps the folder's sums, which must notice it. One of structure may come with sums that are right or absent,
since whoever edits a folder can renew them: then what is left of it must be noticed by its structure.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from folder_mutations import MUTATIONS, mutate_scheme
from judging import Failure, judge_error, judge_image, tree
from quantized_models import quantized_pipeline
from stable_diffusion_base import build_parts

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from tiny_models import build_tiny_pipeline

X = np.random.RandomState(0).randint(0, 255, (9, 7, 3)).astype("uint8")
SECONDS = 5.0  # of processor time, for loading and one image of these models


@dataclass(frozen=True)
class Template:
    """A sound folder and the image that it gives."""

    folder: Path
    image: np.ndarray


@cache
def templates(place: Path) -> dict[str, Template]:
    """Full precision, in parts, quantized, and with a text encoder."""
    plain = build_tiny_pipeline()
    parts = build_parts(place / "tables")
    embedding = PromptEmbedding.from_tensor(torch.randn(1, 7, parts.unet.config["cross_attention_dim"]))
    text = QArtSRPipeline(
        parts.unet, parts.vae, parts.scheduler, embedding, parts.text_encoder, parts.tokenizer, timestep=250, scale=4
    )
    found = {}
    for name, pipeline, options in (
        ("fp", plain, {}),
        ("parts", plain, {"max_shard_size": "20KB"}),
        ("quantized", quantized_pipeline(), {}),
        ("text", text, {}),
    ):
        pipeline.save_pretrained(place / name, **options)
        found[name] = Template(place / name, enlarge(QArtSRPipeline.from_pretrained(place / name)))
    return found


def enlarge(pipeline: QArtSRPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(X, output_type="np").images


def run_case(rng: random.Random, place: Path) -> str:
    """One mutation of one folder; returns its description, raises Failure with it."""
    kind = rng.choice(list(templates(place)))
    template = templates(place)[kind]
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template.folder, folder)
    mutate = rng.choice(MUTATIONS)
    if kind == "quantized" and rng.random() < 0.4:
        mutate = mutate_scheme
    said, exact = mutate(rng, folder)
    said = f"{kind}: {said}"
    before, start = tree(folder), time.process_time()
    os.environ["FUZZ_EXECUTED"] = str(folder / "executed")
    try:
        image = enlarge(QArtSRPipeline.from_pretrained(folder))
        if exact is not None:
            judge_image(image, template.image, exact)
    except Failure as failure:
        raise Failure(f"{said}: {failure}") from failure
    except Exception as error:
        try:
            judge_error(error, str(folder))
        except Failure as failure:
            raise Failure(f"{said}: {failure}") from error
    used = time.process_time() - start
    if used > SECONDS:
        raise Failure(f"{said}: an answer after {used:.1f} seconds of processor time")
    if (folder / "executed").exists():
        raise Failure(f"{said}: code in the folder was executed")
    if tree(folder) != before:
        raise Failure(f"{said}: loading left {set(tree(folder)) ^ set(before)}")
    return said
