"""The engine: quantizes a full-precision pipeline as a recipe says. It knows no method by name.

Observers see the full-precision model, every layer's parameters are set (`initialise`), then the recipe's stages train them
(`stages`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.pairs import Patches
from qartsr_pipeline.calibration.recipe import Recipe, check_quantizes
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise
from qartsr_pipeline.calibration.start.other_grids import layer_kinds
from qartsr_pipeline.calibration.start.schemes import COMPONENTS, fold_and_make_schemes, give_ranks, observe_full_precision
from qartsr_pipeline.calibration.start.warm_start import record_of_folder, start_from_folder
from qartsr_pipeline.calibration.training.calibration_state import load_parameters, quantization_parameters, started_from
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.preparation import Preparation, Told
from qartsr_pipeline.calibration.training.stages import Calibrated, Run, Watch, weights_digest
from qartsr_pipeline.calibration.training.workers import ALONE, Workers
from qartsr_pipeline.quantization.calibrating import prepare


def quantize(
    pipeline: QArtSRPipeline,
    full_precision: QArtSRPipeline,
    recipe: Recipe,
    bits: tuple[int, int],
    patches: Patches,
    seed: int = 0,
    state: Path | None = None,
    **options: Any,
) -> Calibrated:
    """Quantizes UNet and VAE in place; afterwards their layers are calibrating ones, to be frozen or measured.

    Arguments and errors are those of `begin`, which this completes.

    Raises:
        FloatingPointError: the loss is no number any more. OSError: disk full.
    """
    return begin(pipeline, full_precision, recipe, bits, patches, seed, state, **options).complete()


def check_start(recipe: Recipe, start: Path | None) -> None:
    """Raises ValueError if the recipe's layers cannot take the parameters of what ``start`` is, see `begin`."""
    if start and start.is_dir() and not recipe.layer.deployable:
        raise ValueError(
            f"{start} is on another grid than that of {recipe.method}, which exists in simulation only:"
            " start this recipe from the state of a run of its own"
        )


def begin(
    pipeline: QArtSRPipeline,
    full_precision: QArtSRPipeline,
    recipe: Recipe,
    bits: tuple[int, int],
    patches: Patches,
    seed: int = 0,
    state: Path | None = None,
    degradation: str = "bicubic",
    perceptual: Perceptual | None = None,
    every: int = 20,
    start: Path | None = None,
    data: dict[str, Any] | None = None,
    watch: Watch | None = None,
    preparing: Told | None = None,
    workers: Workers = ALONE,
) -> Run:
    """Replaces the layers of UNet and VAE by calibrating ones, whose parameters are set but not trained.

    Args:
        pipeline: full precision.
        full_precision: another instance of the same model, which stays as it is.
        bits: of weights and activations, 2, 3, 4, 6, 8 or 16.
        patches: where calibration patches come from.
        state: file of the run's state: continued from if it is there, written to every ``every`` steps.
        degradation: a name in `DEGRADATIONS`.
        perceptual: needed if a stage has such a loss.
        start: state of a finished run, or a quantized pipeline folder, of the same model, of any bits: its parameters are started
            from.
        data: fingerprint of the pictures behind ``patches``: a state is not continued with others.
        watch: called after every step with the steps done and those in all; True stops the run there, saved as after Ctrl-C.
        preparing: told of what is done before the first step, see `Preparation`.
        workers: the processes that share the work; all call this with the same arguments.

    Raises:
        ValueError: already quantized; the recipe needs a perceptual loss and there is none; ``state`` is of another run; or the
            processes cannot share a batch evenly.
        OSError: disk full.
    """
    if perceptual is None and recipe.is_perceptual:
        raise ValueError(f"the recipe of {recipe.method} has a perceptual loss: give one, see load_perceptual")
    check_quantizes(bits)
    check_start(recipe, start)
    workers.check(recipe)
    schemes = fold_and_make_schemes(pipeline, recipe, bits)
    identity = {
        "recipe": recipe.to_dict(),
        "bits": list(bits),
        "seed": seed,
        "data": data,
        "degradation": degradation,
        "weights": weights_digest(pipeline),
        "perceptual": perceptual.name if perceptual else None,
        "start": None if start is None else record_of_folder(start) if start.is_dir() else started_from(start),
    }
    preparation = Preparation(preparing, shown=workers.is_main)
    samples = observe_full_precision(pipeline, schemes, recipe, patches, seed, degradation, preparation)
    kinds = layer_kinds(recipe.layer, any("step" in stage.train for stage in recipe.stages))
    if recipe.layer.branch_budget:
        schemes = workers.of_first(
            lambda: give_ranks(pipeline, schemes, recipe, kinds, samples, patches, seed, degradation, preparation)
        )
    torch.manual_seed(seed)  # adapters start from random numbers
    for component in COMPONENTS:
        prepare(getattr(pipeline, component), schemes[component], recipe.layer.adapter_rank, kinds)
    run = Run(
        pipeline,
        full_precision,
        recipe,
        patches,
        seed,
        degradation,
        perceptual,
        Calibrated(schemes),
        state=state,
        every=every,
        identity=identity,
        watch=watch,
        samples=samples,
        workers=workers,
    )
    if workers.of_first(lambda: state is not None and state.exists()):
        run.restore()
    else:
        options = Initialisation.of(recipe.layer)
        run.result.errors_before = initialise(run.layers, samples, options, preparation)
        if start and start.is_dir():
            start_from_folder(start, run.layers, samples, options)
        elif start:
            load_parameters(start, run.layers, identity["weights"])
        run.save()
    workers.as_first(quantization_parameters(run.layers).values())
    return run
