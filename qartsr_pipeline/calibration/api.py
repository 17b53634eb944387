"""`quantize`: the one call that makes a quantized model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline.calibration.arguments import AUTO, Order, RunArguments, argument_text, default_recipe, read_arguments
from qartsr_pipeline.calibration.carry_out import QuantizationResult, carry_out
from qartsr_pipeline.calibration.data.patches import MemoryImage
from qartsr_pipeline.calibration.families import FAMILIES, family_of, kind_of_folder
from qartsr_pipeline.calibration.family import Family
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.retraining.settings import TimestepSearch, phase_text
from qartsr_pipeline.calibration.run_folder import check_free
from qartsr_pipeline.calibration.training.progress import Callbacks, PreparationCallback, StepCallback
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline


def quantize(
    model: CheckpointPipeline | str | os.PathLike,
    bits: str | tuple[int, int] = "w4a4",
    data: str | os.PathLike | Sequence[MemoryImage] | Iterable[torch.Tensor] | None = None,
    *,
    recipe: Recipe | str | os.PathLike | None = None,
    steps: int | None = None,
    seed: int = 0,
    degradation: str = "bicubic",
    perceptual: str = "auto",
    perceptual_weights: str | os.PathLike | None = None,
    timestep: int | str | TimestepSearch = "keep",
    start: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "float32",
    evaluation_data: str | os.PathLike | Sequence[MemoryImage] | None = None,
    output: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    callback: StepCallback | None = None,
    progress: PreparationCallback | None = None,
) -> QuantizationResult:
    """Quantizes a full-precision model, calibrates it, measures it, and returns it ready to use.

    The same arguments give the same model, bit for bit, on the same machine with the same number of threads. Where ``output``
    holds an unfinished run of the same arguments, it is continued, and ends as if it had never been stopped. Prints nothing.

    Args:
        model: a full-precision pipeline of images or video, which is left as it is; a checkpoint folder; the name of a shipped
            model, such as "tiny-fp"; or a Hub id "owner/name".
        bits: of weights and activations, as "w4a4" or (4, 4). Each is 2, 3, 4, 6, 8, or 16 for no quantization.
        data: images to calibrate on, of at least 256 pixels a side: a folder of photographs; a list of PIL images, arrays
            (H, W, 3) or tensors (3, H, W), uint8 or floats in [0, 1]; or a finite iterable of tensors, which is read once and
            held in memory with 8 bits. For a video pipeline clips of at least 5 frames: a video file; a folder with video files,
            or one folder of images for each; or a list of clips as the pipeline takes them. A video file is cut into its scenes;
            of long ones, parts are taken. None for procedural images, which need no data; photographs and clips give better
            results.
        recipe: the method: a name ("qartsr", "lsq", "efficientdm", "maxmin", ..; see `recipe_names`), a YAML file, or a `Recipe`.
            None: "qartsr", for a video pipeline "lsgquant".
        steps: optimizer steps in all, 0 or more; None for as many as the recipe says (350 for most). More is better and slower.
        seed: decides which patches are cut from the images, 0 or more.
        degradation: how low-resolution images are made of them: "bicubic", or with blur, noise and JPEG: "real", "photo",
            "realesrgan".
        perceptual: what a recipe's perceptual loss is: "encoder" (features of the model's own encoder), "lpips" (VGG16, needs the
            package of that name), or "auto": LPIPS if package and backbone are on this machine. The record says which.
        perceptual_weights: for LPIPS: a local file with the weights of its backbone, or a folder with one; None to look for it
            and, for "lpips", to download it.
        timestep: "keep" the model's own; a number from 0 to 999 to retrain it there first; "search", or a `TimestepSearch` with
            settings of its own, to find the timestep at which quantization costs least. Retraining takes hours.
        start: a finished run's folder, or a quantized checkpoint, of the same model and of any bits, to start from.
        dtype: what frozen weights are held in, "float32", "bfloat16" or "float16" (of image models only): 16 bits take half the
            memory. Everything is computed, and all that is trained is held, in float32.
        evaluation_data: images to measure on, as for ``data`` but not the same; None for the sample that comes with the package.
        output: folder for the run: `model/` (a checkpoint), `report/`, and what continuing it needs. None keeps nothing on disk,
            and a stopped run is lost.
        device: where to compute, such as "cuda:1"; None for the pipeline's own, or the first GPU there is.
        callback: called after every step as (step, steps, loss), steps counting from 1; returning True stops the run, saved.
            Where the model is retrained at another timestep first, that training has steps of its own.
        progress: called as (what, done, total) while the run is prepared: "read clips", "observe", "choose ranks", "set layers".

    Returns:
        The pipeline, its report, every layer's error, and metrics; ``finished`` is False if the run was stopped.

    Raises:
        ValueError: an argument is invalid, and named; the model is quantized already; ``output`` holds a run with other
            arguments; an image to measure on is among those that the model was made with.
        FileExistsError: ``output`` holds something else. OSError: files that cannot be read or written; another process works in
            ``output``.
        CheckpointError: a model that is damaged or unavailable. VideoFileError: a ValueError; a clip that cannot be read, is
            damaged or in HDR, or PyAV is not installed.
        FloatingPointError: training diverged; a smaller learning rate is the way out.

    Example:
        >>> from dataclasses import replace
        >>> from PIL import Image
        >>> from qartsr_pipeline import load_recipe, quantize
        >>> recipe = replace(load_recipe("maxmin"), images=2, image_size=64)  # fewer images than the recipe's 16
        >>> gradient = Image.linear_gradient("L").convert("RGB").resize((64, 64))
        >>> result = quantize("tiny-fp", bits="w8a8", recipe=recipe, evaluation_data=[gradient], device="cpu")
        >>> result.finished, len(result.layers) > 50
        (True, True)
        >>> max(layer.after for layer in result.layers) < 0.1  # of the power of the layer's output
        True
        >>> result.pipeline(gradient.crop((0, 0, 32, 24))).images[0].size
        (128, 96)
    """
    given = model if isinstance(model, CheckpointPipeline) else None
    kind = type(given) if given else kind_of_folder(fetch(os.fspath(model)))
    family = family_of(given) if given else FAMILIES[kind]
    if recipe is None:
        recipe = default_recipe(kind.__name__)
    images, measured = _pixels(family, data, "data"), _pixels(family, evaluation_data, "evaluation_data")
    arguments = RunArguments(
        model=_name_of(model),
        recipe=recipe.to_dict() if isinstance(recipe, Recipe) else os.fspath(recipe),
        bits=bits if isinstance(bits, str) else "w{}a{}".format(*bits),
        steps=steps,
        start=None if start is None else os.fspath(start),
        data=os.fspath(data) if isinstance(data, (str, os.PathLike)) else None,
        degradation=degradation,
        perceptual=perceptual,
        perceptual_weights=None if perceptual_weights is None else os.fspath(perceptual_weights),
        evaluate=os.fspath(evaluation_data) if isinstance(evaluation_data, (str, os.PathLike)) else None,
        dtype=str(dtype).removeprefix("torch."),
        seed=seed,
        model_in_memory=given is not None,
        data_in_memory=None if images is None else str(family.source(None, images)[1]["sha256"]),
        evaluate_in_memory=measured is not None,
    )
    order = Order(
        _at(arguments, timestep),
        output=Path() if output is None else Path(output),
        device=device,
        model=given,
        data=images,
        evaluation=measured,
        keeps_output=output is not None,
    )
    callbacks = Callbacks(callback, progress)
    if output is None:
        with tempfile.TemporaryDirectory(prefix="qartsr-") as folder:
            return carry_out(replace(order, output=Path(folder)), callbacks)
    return carry_out(_continued(order), callbacks)


def _name_of(model: CheckpointPipeline | str | os.PathLike) -> str:
    """The folder, shipped name or Hub id; of a pipeline that it was loaded from, or nothing."""
    if isinstance(model, CheckpointPipeline):
        return str(model.config.get("_name_or_path") or "")
    return os.fspath(model)


def _at(arguments: RunArguments, timestep: int | str | TimestepSearch) -> RunArguments:
    """The arguments with what the timestep is to be."""
    if not isinstance(timestep, TimestepSearch):
        return replace(arguments, timestep=str(timestep))
    return replace(
        arguments,
        timestep="search",
        timesteps=timestep.timesteps,
        phases=tuple(map(phase_text, timestep.phases)),
        full_phases=tuple(map(phase_text, timestep.full_phases)),
        least_bypass_cost=timestep.rule.least_bypass_cost,
        quality_margin=timestep.rule.quality_margin,
        held_out=timestep.held_out,
        search_bits="w{}a{}".format(*timestep.bits),
    )


def _pixels(family: Family, data: str | os.PathLike | Iterable[Any] | None, name: str) -> list[np.ndarray] | None:
    """What is in memory, see `Family.in_memory`; None for a folder, or nothing."""
    if data is None or isinstance(data, (str, os.PathLike)):
        return None
    return family.in_memory(data, name)


def _continued(order: Order) -> Order:
    """The order, as the continuation of a run with these arguments if its folder holds one.

    Raises:
        ValueError: it holds a run with others, by name. FileExistsError: it holds something else.
    """
    arguments, there = order.arguments, read_arguments(order.output)
    if there is None:
        check_free(order.output)
        return order
    if arguments.perceptual == AUTO:  # whatever the run began with
        arguments = replace(arguments, perceptual=there.perceptual)
    for name in there.differing(arguments):
        raise ValueError(
            f"{order.output} holds a run with other arguments: {argument_text(name)} is {getattr(there, name)!r} there, not"
            f" {getattr(arguments, name)!r}. Repeat that run's arguments to continue it, or choose another output folder"
        )
    return replace(order, arguments=arguments, continues=True)
