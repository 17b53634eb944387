"""One calibration while it goes on: a recipe's stages train the parameters of calibrating layers, step by step.

A step is a function of the parameters, the seed and its number: what is resumed from a saved state ends bit for bit as if never
stopped, on the same machine with the same number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.pairs import Patches
from qartsr_pipeline.calibration.recipe import Recipe, Stage
from qartsr_pipeline.calibration.start.initialise import relative_output_error
from qartsr_pipeline.calibration.start.observers import InputSample
from qartsr_pipeline.calibration.start.schemes import COMPONENTS
from qartsr_pipeline.calibration.stopping import Stopped, StopSignals
from qartsr_pipeline.calibration.training.blocks import Block, Turn, find_blocks, turns
from qartsr_pipeline.calibration.training.calibration_state import load_calibration, quantization_parameters, save_calibration
from qartsr_pipeline.calibration.training.extended import end_to_end_loss
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.optimization import has_any, keep_zero_inside, parameter_groups
from qartsr_pipeline.calibration.training.rpq import module_loss, record, start_turn
from qartsr_pipeline.calibration.training.sharing import recomputed
from qartsr_pipeline.calibration.training.tensor_store import TensorStore
from qartsr_pipeline.calibration.training.workers import ALONE, Workers
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers
from qartsr_pipeline.quantization.scheme import QuantizationScheme

Watch = Callable[[int, int], bool]
MEMORY_FOR_ACTIVATIONS = 2 * 2**30  # bytes of recorded block outputs that stay in memory; more go to disk


@dataclass
class Calibrated:
    """What a run made, beside the pipeline itself.

    Attributes:
        schemes: of UNet and VAE, to freeze with.
        losses: stage -> loss of every step.
        turns: of every module's turn: stage, module, loss of its first and last step.
        errors_before, layer_errors: "component.layer" -> relative squared error of the layer's output alone on calibration
            inputs, |y_q - y|^2 / |y|^2, before and after training.
        histograms: "component.layer" -> histogram of its smoothed input, and the bounds: counts, edges, lower, upper.
        weights: SHA-256 of the original weights, the same before and after.
        start: what is recorded of the run that it started from.
        stopped: whether it was asked to stop before the end.
    """

    schemes: dict[str, QuantizationScheme]
    losses: dict[str, list[float]] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    errors_before: dict[str, float] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: str = ""
    start: dict[str, Any] | None = None
    stopped: bool = False


def all_layers(pipeline: QArtSRPipeline) -> dict[str, CalibratingMixin]:
    """ "component.layer" -> calibrating layer."""
    return {
        f"{component}.{name}": layer
        for component in COMPONENTS
        for name, layer in calibrating_layers(getattr(pipeline, component)).items()
    }


def weights_digest(pipeline: QArtSRPipeline) -> str:
    """SHA-256 over the weights and biases of a folded UNet and of the VAE, without quantization parameters."""
    digest = hashlib.sha256()
    for component in COMPONENTS:
        for name, module in getattr(pipeline, component).named_modules():
            for key in ("weight", "bias"):
                tensor = module._parameters.get(key)
                if tensor is not None:
                    digest.update(f"{component}.{name}.{key}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _without_rates(recipe: Recipe) -> Recipe:
    return replace(recipe, steps=0, stages=tuple(replace(stage, lr=1.0) for stage in recipe.stages))


@dataclass
class Run:
    """One calibration while it goes on. Its position and what `state` holds: stage, turn, step, parameters, optimizer.

    Attributes:
        every: steps between saved states; 0 for none.
        watch: see `engine.begin`.
        samples: of every layer's input, by name.
        workers: the processes that share the work.
    """

    pipeline: QArtSRPipeline
    full_precision: QArtSRPipeline
    recipe: Recipe
    patches: Patches
    seed: int
    degradation: str
    perceptual: Perceptual | None
    result: Calibrated
    state: Path | None = None
    every: int = 20
    identity: dict[str, Any] = field(default_factory=dict)
    watch: Watch | None = None
    samples: dict[str, InputSample] = field(default_factory=dict)
    workers: Workers = ALONE

    def __post_init__(self) -> None:
        self.blocks: list[Block] = find_blocks(self.pipeline)
        self.layers = all_layers(self.pipeline)
        self.names = {id(layer): name for name, layer in self.layers.items()}
        self._check_something_is_trained()
        self._to_the_beginning()

    def _check_something_is_trained(self) -> None:
        for stage in self.recipe.stages:
            if sum(self.recipe.steps_of(stage, 1)) and not any(self._trained(block, stage) for block in self.blocks):
                raise ValueError(
                    f"stage {stage.name!r} trains {', '.join(stage.train)} of the layers {stage.layers!r}, and there are none:"
                    f" layers have names such as {', '.join(list(self.layers)[:2]) or '(none is quantized)'}"
                )

    def _to_the_beginning(self) -> None:
        self.stage_index = self.turn_index = self.step = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_state: dict[str, Any] | None = None

    def complete(self) -> Calibrated:
        """Trains, and measures what came of it.

        Raises:
            FloatingPointError: the loss is no number any more. OSError: disk full.
        """
        try:
            self.train()
        except Stopped:
            self.result.stopped = True
            return self.result
        result = self.result
        result.layer_errors = {name: relative_output_error(layer, self.samples[name].rows) for name, layer in self.layers.items()}
        result.histograms = histograms(self.layers, self.samples)
        result.weights, result.start = weights_digest(self.pipeline), self.identity["start"]
        if result.weights != self.identity["weights"]:
            raise RuntimeError("the original weights were changed, which nothing may do: this is an error of the program")
        for layer in self.layers.values():
            layer.requires_grad_(False)
        return result

    def parameters(self) -> dict[str, torch.Tensor]:
        """A copy of the quantization parameters, for `start_again`."""
        return {name: parameter.clone() for name, parameter in quantization_parameters(self.layers).items()}

    @torch.no_grad()
    def start_again(self, recipe: Recipe, parameters: dict[str, torch.Tensor], state: Path | None) -> None:
        """Back to ``parameters``, or to ``state`` where it exists, to be trained by a recipe of other steps or learning rates."""
        if _without_rates(recipe) != _without_rates(self.recipe):
            raise ValueError("a run starts again with other steps and learning rates only: quantize anew for other recipes")
        for name, parameter in quantization_parameters(self.layers).items():
            parameter.copy_(parameters[name])
        self.recipe, self.state = recipe, state
        self.identity = self.identity | {"recipe": recipe.to_dict()}
        self.result = Calibrated(self.result.schemes, errors_before=self.result.errors_before)
        self._to_the_beginning()
        if self.workers.of_first(lambda: state is not None and state.exists()):
            self.restore()

    def train(self) -> None:
        """Runs the stages from the position on.

        Raises:
            Stopped: asked to; saved. FloatingPointError: the loss is no number; the last saved state is kept.
        """
        done = sum(len(losses) for losses in self.result.losses.values())
        bar = tqdm(total=self._total(), initial=done, unit="step", mininterval=1, disable=not self.workers.is_main)
        with StopSignals() as self.stop, recomputed(self.blocks), bar as self.bar:
            for index, stage in enumerate(self.recipe.stages):
                if index >= self.stage_index:
                    self._stage(index, stage)
        for block in self.blocks:
            block.quantize(True)

    def _total(self) -> int:
        return sum(sum(self.recipe.steps_of(stage, 1)) for stage in self.recipe.stages)

    def _stage(self, index: int, stage: Stage) -> None:
        order = turns(self.blocks, stage.modules, stage.order)
        trained = [any(self._trained(block, stage) for block in turn.blocks) for turn in order]
        shares = iter(self.recipe.steps_of(stage, sum(trained)))
        steps = [next(shares) if any_trained else 0 for any_trained in trained]
        if not sum(steps):
            return
        self.stage_index = index  # stages without steps before it were passed by
        if stage.modules == "all":
            for block in self.blocks:
                block.quantize(True)
            self._turn(stage, order, steps, 0, lambda step: self._end_to_end(index, stage, step))
            self._next_stage()
            return
        for block in self.blocks:
            block.quantize(False)
        folder = self.state.parent if self.state else None
        with TensorStore(MEMORY_FOR_ACTIVATIONS, folder) as store:
            count = min(self.recipe.cached_batches, sum(steps))
            recording = record(
                self.pipeline,
                self.blocks,
                stage,
                self.patches,
                [self.seed, index, 1],
                count,
                store,
                self.degradation,
                self.workers,
            )
            for number, turn in enumerate(order):
                start_turn(self.blocks, turn, stage)
                if number >= self.turn_index:
                    first = sum(steps[:number])  # so that not every module begins with the same batch
                    self._turn(
                        stage, order, steps, number,
                        lambda step, turn=turn, first=first: module_loss(
                            recording, turn, stage.loss, first + step, self.perceptual
                        ),
                    )  # fmt: skip
        self._next_stage()

    def _next_stage(self) -> None:
        self.stage_index, self.turn_index, self.step = self.stage_index + 1, 0, 0
        self.optimizer = None
        self.save()

    def _end_to_end(self, index: int, stage: Stage, step: int) -> torch.Tensor:
        seed = [self.seed, index, 2, step]
        return end_to_end_loss(
            self.pipeline, self.full_precision, self.patches, stage, seed, self.perceptual, self.degradation, self.workers
        )

    def _turn(self, stage: Stage, order: list[Turn], steps: list[int], number: int, loss_of: Any) -> None:
        """All steps of one turn, from the position on."""
        self._make_optimizer(stage, order[: number + 1] if stage.others == "quantized_so_far" else [order[number]])
        losses = self.result.losses.setdefault(stage.name, [])
        self.bar.set_description_str(f"{stage.name} {order[number].name}" if len(order) > 1 else stage.name, refresh=False)
        while self.step < steps[number]:
            loss = self._step(stage, self._rate(stage, steps[number]), loss_of)
            losses.append(loss)
            self.step += 1
            self.bar.update()
            self.bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
            if self.watch is not None and self.watch(self.bar.n, self.bar.total):
                self.stop.requested = True
            stop = self.workers.anyone(self.stop.requested)  # asked once: a signal may come at any moment
            if stop or (self.every and len(losses) % self.every == 0):
                self.save()
            if stop:
                raise Stopped
        if len(order) > 1 and steps[number]:
            last = losses[-steps[number] :]
            self.result.turns.append({"stage": stage.name, "module": order[number].name, "first": last[0], "last": last[-1]})
        self.turn_index, self.step = number + 1, 0

    def _make_optimizer(self, stage: Stage, so_far: list[Turn]) -> None:
        """Adam over the parameters of the turns so far; what it knows of those before is kept."""
        known: set[int] = set()
        if self.optimizer is None or stage.others == "full_precision":
            for layer in self.layers.values():
                layer.requires_grad_(False)
            self.optimizer, fresh = None, so_far
        else:
            known = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
            fresh = so_far[-1:]
        groups = [
            group
            for turn in fresh
            for block in turn.blocks
            for group in parameter_groups(self._trained(block, stage), stage.train, known)
        ]
        if self.optimizer is None and not groups:
            return  # nothing of these modules is trained: the next one begins
        if self.optimizer is None:
            self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        else:
            for group in groups:
                self.optimizer.add_param_group(group)
        if self.optimizer_state is not None:
            self.optimizer.load_state_dict(self.optimizer_state)
            self.optimizer_state = None

    def _trained(self, block: Block, stage: Stage) -> list[CalibratingMixin]:
        matching = [layer for layer in block.layers if fnmatchcase(self.names[id(layer)], stage.layers)]
        return [layer for layer in matching if has_any(layer, stage.train)]

    def _rate(self, stage: Stage, steps: int) -> float:
        if stage.modules != "all" and stage.others == "quantized_so_far":
            return stage.lr
        return stage.lr * min(1.0, (self.step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * self.step / steps))

    def _step(self, stage: Stage, rate: float, loss_of: Any) -> float:
        loss = loss_of(self.step)
        value = self.workers.mean(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(stage, f"the loss is {value}")
        for group in self.optimizer.param_groups:
            group["lr"] = group["relative"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.workers.average_gradients(parameters)
        if not all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None):
            raise self._diverged(stage, "a gradient is not finite")
        self.optimizer.step()
        keep_zero_inside(self.layers.values())
        return value

    def _diverged(self, stage: Stage, what: str) -> FloatingPointError:
        kept = f"{self.state} has the state before it. " if self.state and self.state.exists() else ""
        return FloatingPointError(
            f"step {self.step} of {stage.name}, {self.bar.desc}: {what}. {kept}Begin another run with a smaller learning rate"
            f" than {stage.lr:g}" + (f"; it can start from this one's parameters, {self.state.parent}" if kept else "")
        )

    def save(self) -> None:
        """Writes the state, where the run has one."""
        if self.state is None or not self.workers.is_main:
            return
        position = {"stage_index": self.stage_index, "turn_index": self.turn_index, "step": self.step}
        result = {"losses": self.result.losses, "turns": self.result.turns, "errors_before": self.result.errors_before}
        optimizer = self.optimizer.state_dict() if self.optimizer else None
        save_calibration(self.state, self.layers, self.identity, position | result | {"optimizer": optimizer})

    def restore(self) -> None:
        """Takes up the state's position, parameters and optimizer; see `load_calibration` for what is raised."""
        entries = load_calibration(self.state, self.layers, self.identity)
        self.stage_index, self.turn_index, self.step = (entries[k] for k in ("stage_index", "turn_index", "step"))
        self.result.losses, self.result.turns = entries["losses"], entries["turns"]
        self.result.errors_before = entries["errors_before"]
        self.optimizer_state = entries["optimizer"]


@torch.no_grad()
def histograms(layers: dict[str, CalibratingMixin], samples: dict[str, InputSample]) -> dict[str, dict[str, Any]]:
    """Of the smoothed input of every layer that has input bounds, see `Calibrated`."""
    found = {}
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
