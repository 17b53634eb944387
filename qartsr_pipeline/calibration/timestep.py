"""Retraining the full-precision model at another timestep, as the first part of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from qartsr_pipeline.calibration.arguments import Order, RunArguments
from qartsr_pipeline.calibration.data.pairs import TrainingData, TrainingSet
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.instances import check_not_offloaded
from qartsr_pipeline.calibration.perceptual import Lpips
from qartsr_pipeline.calibration.recipe import check_quantizes, parse_bits
from qartsr_pipeline.calibration.retraining.move_timestep import check_patches
from qartsr_pipeline.calibration.retraining.settings import Settings, TimestepSearch
from qartsr_pipeline.calibration.saving import whole_folder
from qartsr_pipeline.calibration.training.progress import Progress
from qartsr_pipeline.calibration.trq import TRQ


def search_of(arguments: RunArguments) -> TimestepSearch:
    """The search that the arguments describe; where they give the timestep, it is the only candidate.

    Raises:
        ValueError: an argument of it that cannot be.
    """
    searched, bits = arguments.timestep == "search", parse_bits(arguments.search_bits)
    check_quantizes(bits)
    return TimestepSearch.parse(
        arguments.timesteps if searched else (int(arguments.timestep),),
        arguments.phases,
        arguments.full_phases,
        arguments.least_bypass_cost,
        arguments.quality_margin,
        arguments.held_out if searched else max(1, arguments.held_out),  # nothing is measured without a search
        bits,
    )


def retraining_data(order: Order) -> TrainingSet:
    """The images that the model is retrained on, after a check that they are large enough.

    Raises:
        ValueError: they are too small for a phase or for validation, or all of them are held out. ImageFileError: one cannot be
            read.
    """
    arguments, search = order.arguments, search_of(order.arguments)
    images = order.data if order.data is not None else arguments.data
    data = TrainingData(images, 1.0 if images is None else 0.0, arguments.degradation, arguments.held_out).load()
    check_patches(data.patches, (*(search.phases if arguments.timestep == "search" else ()), *search.full_phases))
    return data


def at_timestep(
    order: Order, data: TrainingSet, device: str | torch.device, progress: Progress
) -> tuple[Path, list[dict[str, Any]] | None]:
    """The full-precision pipeline folder, retrained at another timestep, and the search's rows if there was one.

    Args:
        data: from `retraining_data`.

    Raises:
        ValueError: none fits the rule of the search. Stopped: call it again to continue.
    """
    arguments, folder = order.arguments, order.output / "timestep"
    search = search_of(arguments)
    distance, _, lpips = arguments.retraining_loss.partition("+")
    settings = Settings(seed=arguments.seed, every=250, degradation=arguments.degradation, loss=distance)
    perceptual = Lpips("vgg", arguments.perceptual_weights).to(device) if lpips else None
    model = _model_for_retraining(order, folder)
    stage = TRQ(model, data, folder, search, settings, perceptual, device, progress)
    if arguments.timestep != "search":
        return stage.retrain(model, int(arguments.timestep), search.full_phases, folder), None
    chosen = stage.run()
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return chosen, [row | {"chosen": row["timestep"] == sweep["chosen"]} for row in sweep["rows"]]


def _model_for_retraining(order: Order, folder: Path) -> str:
    """What is retrained, by name; a pipeline in memory is written into ``folder`` first, under a name that tells its content.

    Raises:
        ValueError: the pipeline is offloaded. SavingError: it cannot be written.
    """
    if order.model is None:
        return order.arguments.model
    check_not_offloaded(order.model)
    content = hashlib.sha256(family_of(order.model).digest(order.model).encode())
    content.update(repr((order.model.config["timestep"], order.model.vae.config.scaling_factor)).encode())
    content.update(order.model.prompt_embedding(1).detach().float().cpu().numpy().tobytes())
    given = folder / f"given-{content.hexdigest()[:16]}"
    if not given.exists():
        with whole_folder(given) as temporary:
            order.model.save_pretrained(temporary)
    return str(given)
