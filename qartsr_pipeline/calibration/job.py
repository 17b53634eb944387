"""A calibration run before its first step: everything that can be checked is checked, models and data are loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.arguments import (
    ARGUMENTS_NAME,
    AUTO,
    DTYPES,
    PERCEPTUAL_NAMES,
    Order,
    RunArguments,
    recipe_names,
)
from qartsr_pipeline.calibration.data import DEGRADATION_NAMES
from qartsr_pipeline.calibration.data.clips import ClipPatches, is_video_file, read_clip
from qartsr_pipeline.calibration.data.fingerprint import check_no_overlap, overlap, recorded_files
from qartsr_pipeline.calibration.data.pairs import MARGIN
from qartsr_pipeline.calibration.data.patches import (
    ImagePatches,
    Patches,
    check_size,
    is_among,
    list_photographs,
    read_photograph,
)
from qartsr_pipeline.calibration.families import FAMILIES, family_of, kind_of_folder
from qartsr_pipeline.calibration.family import Family
from qartsr_pipeline.calibration.instances import hold_in, instance_of, load_pipeline, on_the_same_weights
from qartsr_pipeline.calibration.recipe import Recipe, check_quantizes, parse_bits
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_perceptual, with_values
from qartsr_pipeline.calibration.report.pipeline_folder import TRAINING_RECORD
from qartsr_pipeline.calibration.retraining.settings import RETRAINING_LOSSES
from qartsr_pipeline.calibration.run_folder import remove_left_over
from qartsr_pipeline.calibration.timestep import at_timestep, retraining_data, search_of
from qartsr_pipeline.calibration.training.calibration_state import STATE_NAME, started_from
from qartsr_pipeline.calibration.training.engine import check_start
from qartsr_pipeline.calibration.training.losses import Perceptual, choose_perceptual
from qartsr_pipeline.calibration.training.progress import Progress
from qartsr_pipeline.calibration.training.workers import Workers
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.folder_lock import LOCK_NAME, FolderLock
from qartsr_pipeline.loading import default_device
from qartsr_pipeline.whole_files import make_folder, write_whole

MODEL, REPORT = "model", "report"  # folders of a run
LEAST_MEASURED = 20  # pixels: windows of 11 for SSIM within a border of 4, in multiples of 4


@dataclass(frozen=True)
class Job:
    """What a run works on.

    Attributes:
        name: of the model, for tables.
        source: folder of the full-precision model, None for one in memory that was not loaded from a folder.
        start: state of the run, or quantized folder, whose parameters this one starts from.
        data: what the record says of the calibration images.
        evaluation: files to measure on.
        before: name -> SHA-256 of the photographs that the models it is made from were made with.
        sweep: rows of the timestep search, if there was one.
        retrained: how the full-precision model was retrained before it was quantized.
        perceptual, no_lpips: kind of the perceptual loss, if the recipe has one, and why it is not LPIPS (`choose_perceptual`).
    """

    order: Order
    recipe: Recipe
    bits: tuple[int, int]
    name: str
    source: Path | None
    start: Path | None
    pipeline: CheckpointPipeline
    full_precision: CheckpointPipeline
    patches: Patches
    data: dict[str, Any]
    evaluation: list[Path]
    before: dict[str, str]
    sweep: list[dict[str, Any]] | None = None
    retrained: dict[str, Any] | None = None
    perceptual: str | None = None
    no_lpips: str | None = None


def load_job(order: Order, family: Family, evaluation: list[Path], progress: Progress, workers: Workers, lock: FolderLock) -> Job:
    """Checks everything that can be checked before the first step, and loads models and data.

    Args:
        family: of the model.
        evaluation: files to measure on.
        progress: of reading clips, and of retraining at another timestep.
        lock: of the run's folder; taken once the arguments are known to be good.

    Raises:
        ValueError, OSError, ImportError: bad arguments, recipe, model or data; images to evaluate on among those to calibrate on;
            another process works in the folder.
        Stopped: retraining at another timestep was stopped.
    """
    arguments = order.arguments
    recipe, bits = recorded_recipe(order) or recipe_of(arguments), parse_bits(arguments.bits)
    check_quantizes(bits)
    _check_choices(arguments, family)
    wanted = (arguments.perceptual, arguments.perceptual_weights)
    kind, no_lpips = choose_perceptual(*wanted) if recipe.is_perceptual else (None, None)
    recipe = with_perceptual(recipe, kind) if kind else recipe
    start = start_of(arguments.start) if arguments.start else None
    check_start(recipe, start)
    workers.check(recipe)
    _check_timestep(arguments, family, start, workers)
    source = source_of(order)
    patches, data = family.source(arguments.data, order.data, progress)
    _check_measured(order, evaluation, patches, data)
    _check_sizes(recipe, patches)
    to_retrain = None if arguments.timestep == "keep" else retraining_data(order)
    before: dict[str, str] = {}
    starts = [start.parent / "model" if start.is_file() else start] if start else []
    for made_from in ([source] if source else []) + starts:
        check_no_overlap(evaluation, made_from)
        before |= recorded_files(made_from) or {}
    if workers.is_main:
        start_folder(order, lock)
    device = workers.device or order.device or (default_device() if order.model is None else order.model.device)
    folder, model, sweep, retrained = source, order.model, None, None
    if to_retrain:
        if kind:  # what it lacks is said before the model is retrained, not after
            perceptual_of(arguments, kind, model or _loaded(source))
        folder, sweep = at_timestep(order, to_retrain, device, progress)
        model, retrained = None, json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))
    pipeline = instance_of(model, device) if model else _loaded(folder).to(device)
    hold_in(pipeline, arguments.dtype)
    full_precision = on_the_same_weights(pipeline)
    for each in (pipeline, full_precision):
        each.set_progress_bar_config(disable=True)
    name = Path(arguments.model).name or "model"
    models = (name, source, start, pipeline, full_precision)
    return Job(order, recipe, bits, *models, patches, data, evaluation, before, sweep, retrained, kind, no_lpips)


def recipe_of(arguments: RunArguments) -> Recipe:
    """The recipe with the changes that the arguments make to it."""
    recipe = Recipe.from_dict(arguments.recipe) if isinstance(arguments.recipe, dict) else load_recipe(arguments.recipe)
    changes = [] if arguments.steps is None else [f"steps={arguments.steps}"]
    return with_values(recipe, [*changes, *arguments.set])


def recorded_recipe(order: Order) -> Recipe | None:
    """The recipe that a run to be continued has begun with, where the arguments name one that comes with the package: it may have
    been another one then. None where there is no state yet.
    """
    state, name = order.output / STATE_NAME, order.arguments.recipe
    if not order.continues or not state.is_file() or not isinstance(name, str) or name not in recipe_names():
        return None
    return Recipe.from_dict(started_from(state)["recipe"])


def start_of(start: str) -> Path:
    """A run's state, or the quantized folder that this names."""
    state = Path(start) / STATE_NAME
    return state if state.exists() else fetch(start)


def _check_choices(arguments: RunArguments, family: Family) -> None:
    losses = {"perceptual": (AUTO, *PERCEPTUAL_NAMES), "retraining_loss": RETRAINING_LOSSES}
    for name, choices in {"degradation": DEGRADATION_NAMES, **losses}.items():
        value = getattr(arguments, name)
        if value not in choices:
            kind = "perceptual loss" if name == "perceptual" else name
            raise ValueError(f"there is no {kind} {value!r}; expected {' or '.join(choices)}")
    if arguments.dtype not in DTYPES:
        raise ValueError(f"there is no dtype {arguments.dtype!r} for frozen weights; expected {', '.join(DTYPES)}")
    if arguments.dtype != "float32" and family.calibrates_on != "images":
        raise ValueError(f"dtype {arguments.dtype}: only image models hold their weights in 16 bits while they are calibrated")
    if not isinstance(arguments.seed, int) or arguments.seed < 0:
        raise ValueError(f"seed is {arguments.seed!r}: expected a whole number from 0 on")


def _check_timestep(arguments: RunArguments, family: Family, start: Path | None, workers: Workers) -> None:
    timestep = arguments.timestep
    if timestep == "keep":
        return
    if family.calibrates_on != "images":
        raise ValueError("--timestep: only image models are retrained at another timestep; a video model keeps its own")
    if start and start.is_file():
        raise ValueError("--start: the run is of the model as it is, and --timestep retrains it; give one of the two")
    if timestep != "search" and not (timestep.isdecimal() and int(timestep) < 1000):
        raise ValueError(f"--timestep {timestep}: expected keep, search, or a number from 0 to 999")
    if arguments.held_out < 0:
        raise ValueError(f"--held-out {arguments.held_out}: expected 0 or more images")
    search_of(arguments)
    if workers.several:
        raise ValueError("--timestep: one process retrains the model; give what it wrote, OUTPUT/timestep/model, to several")


def _check_measured(order: Order, evaluation: list[Path], patches: Patches, data: dict[str, Any]) -> None:
    """Makes sure that images to measure on are readable, large enough, and not among those to calibrate on: by their files or,
    where images are in memory, by their pixels.

    Raises:
        ValueError: one is not, by name. ImageFileError: one cannot be read.
    """
    seen = overlap(evaluation, data.get("files", {}))
    if seen:
        raise ValueError(f"{seen[0]} is among the files to calibrate on: evaluate on others")
    in_memory = order.data is not None or order.evaluation is not None
    calibrated_on = patches.images if in_memory and isinstance(patches, (ImagePatches, ClipPatches)) else []
    too_small = None
    for number, path in enumerate(evaluation):
        name = path if order.evaluation is None else f"evaluation_data[{number}]"
        for pixels in read_clip(path.name, [path]) if is_video_file(path) else [read_photograph(path)]:
            if is_among(pixels, calibrated_on):
                raise ValueError(f"{name} is among the images to calibrate on: evaluate on others")
            if min(pixels.shape[:2]) < LEAST_MEASURED and too_small is None:
                too_small = name, pixels.shape[1], pixels.shape[0]
    if too_small:
        name, width, height = too_small
        raise ValueError(
            f"{name} has {width} x {height} pixels, and an image to measure on needs {LEAST_MEASURED} x {LEAST_MEASURED}:"
            " leave it out, or give a larger one"
        )


def _check_sizes(recipe: Recipe, patches: Patches) -> None:
    """Raises ValueError unless images are large enough for every stage."""
    trained = [stage.patch + 2 * MARGIN for stage in recipe.stages if sum(recipe.steps_of(stage, 1))]
    for size in (recipe.image_size, *trained):
        if isinstance(patches, ClipPatches):
            patches.usable(size)
        else:
            check_size(patches, size)


@contextmanager
def evaluation_files(order: Order, family: Family) -> Iterator[list[Path]]:
    """The images to measure on, or the frames of clips, as files; what is not on disk is written into a temporary folder."""
    if order.evaluation is None and order.arguments.evaluate:
        yield family.files(order.arguments.evaluate)
        return
    with tempfile.TemporaryDirectory(prefix="qartsr-") as folder:
        family.write_for_measuring(order.evaluation, Path(folder))
        yield list_photographs(folder)


def family_of_order(order: Order) -> Family:
    """Of the model that the order names, or has in memory; raises what `source_of` does."""
    return FAMILIES[kind_of_folder(fetch(order.arguments.model))] if order.model is None else family_of(order.model)


def source_of(order: Order) -> Path | None:
    """The folder of the full-precision model."""
    if order.model is None:
        return fetch(order.arguments.model)
    folder = Path(order.arguments.model)
    return folder if (folder / "model_index.json").is_file() else None


def _loaded(source: Path | None) -> CheckpointPipeline:
    assert source is not None  # there is one wherever the model is not in memory
    return load_pipeline(source, kind_of_folder(source))


def perceptual_of(arguments: RunArguments, kind: str, full_precision: CheckpointPipeline) -> Perceptual:
    """The perceptual loss of that kind; raises what `load_perceptual` does."""
    return family_of(full_precision).perceptual(full_precision, kind, arguments.perceptual_weights)


def start_folder(order: Order, lock: FolderLock) -> None:
    """Makes the run's folder, takes its lock, writes the arguments into it, and removes what a killed process left there.

    Raises:
        FolderInUseError: another process works there. SavingError: the folder cannot be made or written to.
    """
    make_folder(order.output)
    lock.take()
    for folder in (order.output, order.output / REPORT):
        remove_left_over(folder)
    write_whole(order.output / ARGUMENTS_NAME, order.arguments.to_json().encode())


def forget_unbegun(output: Path) -> None:
    """Removes the arguments of a run that ended with an error before it made anything: the call can be corrected."""
    if output.is_dir() and {path.name for path in output.iterdir()} - {LOCK_NAME} == {ARGUMENTS_NAME}:
        (output / ARGUMENTS_NAME).unlink()
