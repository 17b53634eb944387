"""The engine: quantizes a full-precision pipeline as a recipe says. It knows no method by name, and no kind of model.

Read from top to bottom:

1. `begin` observes the full-precision model, chooses ranks, replaces its layers by calibrating ones and sets their parameters
   (`qartsr_pipeline.calibration.start`).
2. `Run.complete` trains them stage by stage: modules one after another, or all at once (`stages`).
3. It then measures every layer, and makes sure that no original weight was changed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from qartsr_pipeline.calibration.recipe import Recipe, check_quantizes
from qartsr_pipeline.calibration.start.forward_order import round_on_quantized_inputs
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, relative_output_error
from qartsr_pipeline.calibration.start.observers import InputSample
from qartsr_pipeline.calibration.start.other_grids import layer_kinds
from qartsr_pipeline.calibration.start.rounding import COARSE
from qartsr_pipeline.calibration.start.schemes import fold_and_make_schemes, give_bits, give_ranks, observe_full_precision
from qartsr_pipeline.calibration.start.warm_start import record_of_folder, start_from_folder
from qartsr_pipeline.calibration.training.blocks import recomputed
from qartsr_pipeline.calibration.training.calibration_state import (
    NO_STATE,
    CalibrationContext,
    StateFile,
    load_parameters,
    quantization_parameters,
    started_from,
)
from qartsr_pipeline.calibration.training.progress import Calibrated, Histogram, Stopped, StopSignals
from qartsr_pipeline.calibration.training.qao import refine_layers
from qartsr_pipeline.calibration.training.stages import quantize_per_module, train_end_to_end
from qartsr_pipeline.calibration.training.steps import Training
from qartsr_pipeline.calibration.training.volts import classified
from qartsr_pipeline.freed_memory import return_freed_memory
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, prepare
from qartsr_pipeline.quantization.scheme import quantizable_layers
from qartsr_pipeline.quantization.token_layers import TokenLinear


def calibrate(context: CalibrationContext, state: StateFile = NO_STATE, start: Path | None = None) -> Calibrated:
    """Quantizes the context's pipeline in place; afterwards its layers are calibrating ones, to be frozen or measured.

    Arguments and errors are those of `begin`, which this completes.

    Raises:
        FloatingPointError: the loss became NaN or infinite. OSError: disk full.
    """
    return begin(context, state, start).complete()


def check_start(recipe: Recipe, start: Path | None) -> None:
    """Raises ValueError if the recipe's layers cannot take the parameters of what ``start`` is, see `begin`."""
    if start and start.is_dir() and not recipe.layer.deployable:
        raise ValueError(
            f"{start} is on another grid than that of {recipe.method}, which exists in simulation only:"
            " start this recipe from the state of a run of its own"
        )


def begin(context: CalibrationContext, state: StateFile = NO_STATE, start: Path | None = None) -> Run:
    """Replaces the layers of the pipeline by calibrating ones, whose parameters are set but not trained.

    Args:
        state: where the run's state is kept; its identity is made here.
        start: state of a finished run, or a quantized pipeline folder, of the same model, of any bits: its parameters are started
            from.

    Raises:
        ValueError: already quantized; the recipe needs a perceptual loss and there is none; ``state`` is of another run; or the
            processes cannot share a batch evenly.
        OSError: disk full.
    """
    recipe, pipeline, workers, progress = context.recipe, context.pipeline, context.workers, context.progress
    if context.perceptual is None and recipe.is_perceptual:
        raise ValueError(f"the recipe of {recipe.method} has a perceptual loss: give one, see load_perceptual")
    check_quantizes(context.bits)
    check_start(recipe, start)
    workers.check(recipe)
    schemes = fold_and_make_schemes(pipeline, recipe, context.bits)
    identity = _identity(context, start)
    samples = observe_full_precision(context, schemes)
    return_freed_memory()
    kinds = layer_kinds(recipe.layer, any("step" in stage.train for stage in recipe.stages))
    if recipe.layer.branch_budget:
        schemes = workers.of_first(lambda: give_ranks(context, schemes, kinds, samples))
    curve: list[tuple[float, float]] = []
    if recipe.budget.is_set:
        schemes, assignment = workers.of_first(lambda: give_bits(context, schemes, kinds, samples))
        curve = assignment.curve
    return_freed_memory()
    torch.manual_seed(context.seed)  # adapters start from random numbers
    models = context.family.models(pipeline)
    to_prepare = [component for component, model in models.items() if quantizable_layers(model, schemes[component])]
    for component in to_prepare or models:  # where nothing is left to quantize, this raises
        prepare(models[component], schemes[component], recipe.layer.adapter_rank, kinds)
    for layer in context.family.layers(pipeline).values() if recipe.layer.residual else ():
        if isinstance(layer, TokenLinear) and layer.layer_scheme.weight_bits < 16:
            layer.train_residual()
    run = Run(Training(context, Calibrated(schemes, curve=curve), replace(state, identity=identity)), samples)
    one_by_one = run.training.trained_one_by_one()
    if one_by_one:
        run.training.result.sensitivities = classified({name: samples[name] for name in one_by_one}, recipe.volts)
    if workers.of_first(lambda: state.exists):
        run.training.restore()
    else:
        options = Initialisation.of(recipe.layer)
        layers = run.training.layers
        run.training.result.errors_before = initialise(layers, samples, options, progress)
        if start and start.is_dir():
            start_from_folder(start, layers, samples, options)
        elif start:
            load_parameters(start, layers, identity["weights"])
        elif recipe.layer.rounding == "patches" and recipe.layer.rounding_inputs == "quantized" and context.bits[1] <= COARSE:
            for name in round_on_quantized_inputs(context, layers):
                run.training.result.errors_before[name] = relative_output_error(layers[name], samples[name])
        run.training.save()
    workers.as_first(quantization_parameters(run.training.layers).values())
    return run


def _identity(context: CalibrationContext, start: Path | None) -> dict:
    """What a run is a function of, as JSON types. The model is folded already."""
    return {
        "recipe": context.recipe.to_dict(),
        "bits": list(context.bits),
        "seed": context.seed,
        "data": context.data,
        "degradation": context.degradation,
        "weights": context.family.digest(context.pipeline),
        "perceptual": context.perceptual.name if context.perceptual else None,
        "start": None if start is None else record_of_folder(start) if start.is_dir() else started_from(start),
    }


class Run:
    """A calibration whose parameters are set.

    Args:
        samples: of every layer's input, by name.
    """

    def __init__(self, training: Training, samples: dict[str, InputSample]):
        self.training, self.samples = training, samples

    @property
    def pipeline(self) -> DiffusionPipeline:
        return self.training.context.pipeline

    def complete(self) -> Calibrated:
        """Trains, and measures what came of it.

        Raises:
            FloatingPointError: the loss became NaN or infinite. OSError: disk full.
        """
        training, result, context = self.training, self.training.result, self.training.context
        try:
            self.train()
        except Stopped:
            result.stopped = True
            return result
        for name, layer in training.layers.items():
            result.layer_errors[name] = relative_output_error(layer, self.samples[name])
            layer.forget()
        result.histograms = histograms(training.layers, self.samples)
        result.weights, result.start = context.family.digest(context.pipeline), training.state.identity["start"]
        if result.weights != training.state.identity["weights"]:
            raise RuntimeError("the original weights were changed, which nothing may do: this is an error of the program")
        for layer in training.layers.values():
            layer.requires_grad_(False)
        return result

    def train(self) -> None:
        """Runs the recipe's stages from the position on.

        Raises:
            Stopped: asked to; saved. FloatingPointError: the loss became NaN or infinite; the last saved state is kept.
        """
        training = self.training
        with StopSignals() as training.stop, recomputed(training.blocks):
            for index, stage in enumerate(training.context.recipe.stages):
                if index < training.position.stage:
                    continue
                plan = training.plan(index, stage)
                if not sum(plan.steps):
                    continue
                training.position.stage = index  # stages without steps before it were passed by
                if stage.modules == "all":
                    train_end_to_end(training, plan)
                elif stage.modules == "layers":
                    refine_layers(training, plan, self.samples)
                else:
                    quantize_per_module(training, plan)
        for block in training.blocks:
            block.quantize(True)

    def parameters(self) -> dict[str, torch.Tensor]:
        """A copy of the quantization parameters, for `start_again`."""
        return {name: parameter.clone() for name, parameter in quantization_parameters(self.training.layers).items()}

    @torch.no_grad()
    def start_again(self, recipe: Recipe, parameters: dict[str, torch.Tensor], state: Path | None) -> None:
        """Back to ``parameters``, or to ``state`` where it exists, to be trained by a recipe of other steps or learning rates."""
        training = self.training
        if _without_rates(recipe) != _without_rates(training.context.recipe):
            raise ValueError("a run starts again with other steps and learning rates only: quantize anew for other recipes")
        for name, parameter in quantization_parameters(training.layers).items():
            parameter.copy_(parameters[name])
        training.context = replace(training.context, recipe=recipe)
        identity = training.state.identity | {"recipe": recipe.to_dict()}
        training.state = replace(training.state, path=state, identity=identity)
        training.result = replace(training.result, losses={}, turns=[], layer_errors={}, histograms={}, stopped=False)
        training.to_the_beginning()
        if training.context.workers.of_first(lambda: training.state.exists):
            training.restore()


def _without_rates(recipe: Recipe) -> Recipe:
    return replace(recipe, steps=0, stages=tuple(replace(stage, lr=1.0) for stage in recipe.stages))


@torch.no_grad()
def histograms(layers: dict[str, CalibratingMixin], samples: dict[str, InputSample]) -> dict[str, Histogram]:
    """Of the smoothed input of every layer that has input bounds."""
    found: dict[str, Histogram] = {}
    for name, layer in layers.items():
        if "input_lower" not in layer._parameters:
            continue
        values = (samples[name].rows * layer.smooth).flatten()
        lower, upper = float(values.min()), float(values.max())
        counts = torch.histc(values, 64, lower, upper)
        found[name] = {
            "counts": [int(count) for count in counts],
            "edges": np.linspace(lower, upper, 65).tolist(),
            "lower": float(layer.input_lower),
            "upper": float(layer.input_upper),
        }
    return found
