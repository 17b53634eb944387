"""The choice of a learning rate: short runs, compared on held-out patches."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from calibration.comparison.methods import Cell
from calibration.comparison.setting import Comparison, Model, finished, write_json
from qartsr_pipeline.calibration.data.pairs import held_out_pairs
from qartsr_pipeline.calibration.image_family import image_of
from qartsr_pipeline.calibration.recipe import Recipe, parse_bits
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.engine import Run, begin
from qartsr_pipeline.calibration.training.progress import Calibrated, Stopped
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

# Factors of the recipe's learning rates. If the smallest or largest one is best, the next of LADDER are tried.
SWEPT = (0.3, 1.0, 3.0)
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SWEEP_SHARE, SWEEP_STEPS = 1 / 3, 20  # a trial has this share of the steps, but at most so many


def with_rate(recipe: Recipe, factor: float, share: float = 1.0) -> Recipe:
    """The recipe with all learning rates times ``factor`` and its steps times ``share``."""
    stages = tuple(replace(stage, lr=stage.lr * factor) for stage in recipe.stages)
    return replace(recipe, stages=stages, steps=math.ceil(recipe.steps * share))


class Trials:
    """Calibrations of one cell with different learning rates and numbers of steps, which all start from the same parameters."""

    def __init__(self, comparison: Comparison, cell: Cell):
        self.comparison, self.cell = comparison, cell
        self._run: Run | None = None

    def calibrate(self, recipe: Recipe, name: str) -> tuple[QArtSRPipeline, Calibrated]:
        """Quantizes the cell's model in simulation. Every call returns the same pipeline, so a later call changes it.

        Args:
            name: of the file that holds the state in between.

        Raises:
            Stopped: by Ctrl-C; the state is saved.
        """
        state = self.comparison.output / "states" / f"{name}.pt"
        state.parent.mkdir(parents=True, exist_ok=True)
        if self._run is None:
            self._run = self._begin(recipe)
            self._parameters = self._run.parameters()
        self._run.start_again(recipe, self._parameters, state)
        calibrated = self._run.complete()
        if calibrated.stopped:
            raise Stopped(f"stopped in {name}; the same command continues it")
        state.unlink(missing_ok=True)
        return self._run.pipeline, calibrated  # type: ignore[return-value]  # the engine takes any pipeline

    def _begin(self, recipe: Recipe) -> Run:
        model, comparison = self.comparison.models[self.cell.model], self.comparison
        perceptual = model.perceptual if recipe.is_perceptual else None
        bits, seed = parse_bits(self.cell.bits), self.cell.seed
        context = CalibrationContext(model.fresh(), model.pipeline, recipe, bits, comparison.patches, seed, perceptual=perceptual)
        return begin(context)


@torch.no_grad()
def held_out_loss(comparison: Comparison, model: Model, pipeline: QArtSRPipeline) -> float:
    """Mean squared distance to full precision's images of the held-out patches, in [-1, 1]."""
    if not model.held_out:
        pairs = held_out_pairs(comparison.held_out, "bicubic")
        model.held_out = [(up.to(model.device), image_of(model.pipeline, up.to(model.device))) for up, _ in pairs]
    losses = [float(F.mse_loss(image_of(pipeline, up), wanted)) for up, wanted in model.held_out]
    loss = sum(losses) / len(losses)
    return loss if math.isfinite(loss) else math.inf


def sweep(trials: Trials) -> dict[str, Any]:
    """Chooses the learning rate of a cell's group with a few steps, by the distance to full precision on held-out patches.

    Returns:
        "factor"; "losses" by factor (None where training diverged); and "bracketed": whether both a smaller and a larger factor
        were worse.

    Raises:
        FloatingPointError: training diverged with every rate. Stopped: by Ctrl-C.
    """
    comparison, cell = trials.comparison, trials.cell
    first = replace(cell, seed=0)
    trials = trials if cell == first else Trials(comparison, first)
    settings = comparison.settings(first) | {"factors": list(SWEPT), "share": _trial_share(first.method.recipe), "metrics": None}
    path = comparison.output / "sweeps" / f"{cell.group}.json"
    known = finished(path, settings)
    if known:
        return known
    losses = {factor: _short_run(trials, factor) for factor in SWEPT}
    best = min(losses, key=losses.__getitem__)
    while losses[best] < math.inf:
        untried = [factor for factor in _neighbours(best) if factor not in losses]
        if not untried:
            break
        losses[untried[0]] = _short_run(trials, untried[0])
        best = min(losses, key=losses.__getitem__)
    if losses[best] == math.inf:
        factors = ", ".join(map(str, SWEPT))
        raise FloatingPointError(f"{cell.group}: training diverges with the recipe's learning rates times {factors}")
    shown = {f"{factor:g}": losses[factor] if math.isfinite(losses[factor]) else None for factor in sorted(losses)}
    bracketed = min(losses) < best < max(losses)
    chosen = {"settings": settings, "factor": best, "losses": shown, "bracketed": bracketed}
    write_json(path, chosen)
    return chosen


def _neighbours(factor: float) -> list[float]:
    """The next smaller and the next larger factor that may be tried."""
    smaller, larger = [f for f in LADDER if f < factor], [f for f in LADDER if f > factor]
    return smaller[-1:] + larger[:1]


def _trial_share(recipe: Recipe) -> float:
    return min(SWEEP_SHARE, SWEEP_STEPS / recipe.steps)


def _short_run(trials: Trials, factor: float) -> float:
    """Loss on held-out patches after a part of the steps with learning rates times ``factor``; infinite if training diverges."""
    cell, comparison = trials.cell, trials.comparison
    recipe = with_rate(cell.method.recipe, factor, _trial_share(cell.method.recipe))
    try:
        pipeline, _ = trials.calibrate(recipe, f"sweep-{cell.group}-x{factor:g}")
    except FloatingPointError:
        return math.inf
    return held_out_loss(comparison, comparison.models[cell.model], pipeline)
