"""The steps of one calibration: optimizer, learning rate, position, saving and stopping. What a step's loss is, the stages say.

A step is a function of the parameters, the seed and its number: what is resumed from a saved state ends bit for bit as if never
stopped, on the same machine with the same number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from qartsr_pipeline.calibration.recipe import Stage
from qartsr_pipeline.calibration.training.blocks import Block, Turn, turns
from qartsr_pipeline.calibration.training.calibration_state import (
    CalibrationContext,
    StateFile,
    load_calibration,
    save_calibration,
)
from qartsr_pipeline.calibration.training.progress import Calibrated, Step, Stopped, StopSignals
from qartsr_pipeline.calibration.training.volts import planned_steps
from qartsr_pipeline.quantization.calibrating import CalibratingLinear, CalibratingMixin

# Prefixes of parameter names, by the name that a recipe's `train` has for them. A step factor is no bound: the longer name wins.
PARAMETERS = {
    "smoothing": ("log_smooth",),
    "offset": ("input_offset",),
    "branch": ("branch_up", "branch_down"),
    "adapter": ("adapter_up", "adapter_down"),
    "bias": ("bias_change",),
    "residual": ("weight_change",),
    "bounds": ("weight_lower", "weight_upper", "input_lower", "input_upper"),
    "step": ("weight_log_step", "input_log_step"),
}
NO_RATES: Mapping[str, float] = {}
LossOfStep = Callable[[int], torch.Tensor]
WARM_UP = 10  # steps until the learning rate is the stage's


@dataclass(frozen=True)
class StagePlan:
    """A stage with its turns, in order, and the steps of each; ``index`` is its number in the recipe."""

    index: int
    stage: Stage
    turns: list[Turn]
    steps: list[int]


@dataclass
class Position:
    """How far training is: stage, turn within it, steps within that."""

    stage: int = 0
    turn: int = 0
    step: int = 0


class Training:
    """The training of one calibration while it goes on.

    Args:
        context: its pipeline has calibrating layers.
        result: losses are added to it.
        state: where position, parameters and optimizer are saved.

    Raises:
        ValueError: a stage that has steps trains nothing.
    """

    def __init__(self, context: CalibrationContext, result: Calibrated, state: StateFile):
        self.context, self.result, self.state = context, result, state
        self.blocks: list[Block] = context.family.blocks(context.pipeline)
        self.layers = context.family.layers(context.pipeline)
        self._names = {id(layer): name for name, layer in self.layers.items()}
        self._check_something_is_trained()
        self.stop = StopSignals()
        self.to_the_beginning()

    def _check_something_is_trained(self) -> None:
        recipe = self.context.recipe
        for stage in recipe.stages:
            if sum(recipe.steps_of(stage, 1)) and not any(self._trained(block, stage) for block in self.blocks):
                raise ValueError(
                    f"stage {stage.name!r} trains {', '.join(stage.train)} of the layers {stage.layers!r}, and there are none:"
                    f" layers have names such as {', '.join(list(self.layers)[:2]) or '(none is quantized)'}"
                )

    def _trained(self, block: Block, stage: Stage) -> list[CalibratingMixin]:
        matching = [layer for layer in block.layers if fnmatchcase(self._names[id(layer)], stage.layers)]
        return [layer for layer in matching if has_any(layer, stage.train)]

    def to_the_beginning(self) -> None:
        self.position = Position()
        self.optimizer: torch.optim.Optimizer | None = None
        self._optimizer_state: dict[str, Any] | None = None

    @property
    def done(self) -> int:
        """Steps made so far."""
        return sum(len(losses) for losses in self.result.losses.values())

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        recipe = self.context.recipe
        return sum(sum(recipe.steps_of(stage, 1)) for stage in recipe.stages)

    def plan(self, index: int, stage: Stage) -> StagePlan:
        """The stage's turns; its steps are divided between those that train anything."""
        if stage.modules == "layers":
            return self._plan_of_layers(index, stage)
        order = turns(self.blocks, stage.modules, stage.order)
        trained = [any(self._trained(block, stage) for block in turn.blocks) for turn in order]
        shares = iter(self.context.recipe.steps_of(stage, sum(trained)))
        return StagePlan(index, stage, order, [next(shares) if any_trained else 0 for any_trained in trained])

    def trained_one_by_one(self) -> list[str]:
        """Names of the layers that stages with ``modules: layers`` train."""
        stages = [stage for stage in self.context.recipe.stages if stage.modules == "layers"]
        return list(dict.fromkeys(name for stage in stages for name in self._owners(stage)))

    def _owners(self, stage: Stage) -> dict[str, Block]:
        """Linear layer that the stage trains -> its block."""
        owners = {self._names[id(layer)]: block for block in self.blocks for layer in self._trained(block, stage)}
        return {name: block for name, block in owners.items() if isinstance(self.layers[name], CalibratingLinear)}

    def _plan_of_layers(self, index: int, stage: Stage) -> StagePlan:
        """A turn for each layer that is trained, the most sensitive first, with its steps at most."""
        recipe, found, owners = self.context.recipe, self.result.sensitivities, self._owners(stage)
        names = sorted(owners, key=lambda name: -found[name]["value"])
        order = [Turn(name, (Block(name, owners[name].part, self.layers[name], (self.layers[name],)),)) for name in names]
        steps = planned_steps([found[name]["kind"] for name in names], recipe.steps_of(stage, 1)[0], recipe.volts)
        return StagePlan(index, stage, order, steps)

    def take_turn(self, plan: StagePlan, number: int, loss_of: LossOfStep) -> None:
        """All steps of one turn, from the position on.

        Raises:
            Stopped: asked to; saved. FloatingPointError: the loss became NaN or infinite; the last saved state is kept.
        """
        stage, steps, several = plan.stage, plan.steps[number], len(plan.turns) > 1
        self._make_optimizer(stage, plan.turns[: number + 1] if stage.others == "quantized_so_far" else [plan.turns[number]])
        place = f"{stage.name} {plan.turns[number].name}" if several else stage.name
        losses = self.result.losses.setdefault(stage.name, [])
        total, done = self.total, self.done
        while self.position.step < steps:
            loss = self._step(plan, place, self._rate(stage, steps), loss_of)
            losses.append(loss)
            self.position.step += 1
            done += 1
            if self.context.progress.stepped(Step(done, total, loss, place)):
                self.stop.requested = True
            stop = self.context.workers.anyone(self.stop.requested)  # asked once: a signal may come at any moment
            if stop or (self.state.every and len(losses) % self.state.every == 0):
                self.save()
            if stop:
                raise Stopped(f"stopped after step {done} of {total}")
        if several and steps:
            last = losses[-steps:]
            self.result.turns.append({"stage": stage.name, "module": plan.turns[number].name, "first": last[0], "last": last[-1]})
        self.position.turn, self.position.step = number + 1, 0

    def next_stage(self) -> None:
        """Moves the position behind the stage, and saves."""
        self.position = Position(self.position.stage + 1)
        self.optimizer = None
        self.save()

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
            for group in parameter_groups(self._trained(block, stage), stage.train, known, stage.rates)
        ]
        if self.optimizer is None and not groups:
            return  # nothing of these modules is trained: the next one begins
        if self.optimizer is None:
            self.optimizer = ColumnAdam(groups, betas=(0.9, 0.95))
        else:
            for group in groups:
                self.optimizer.add_param_group(group)
        if self._optimizer_state is not None:
            self.optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None

    def _rate(self, stage: Stage, steps: int) -> float:
        if stage.modules != "all" and stage.others == "quantized_so_far":
            return stage.lr
        step = self.position.step
        return stage.lr * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))

    def _step(self, plan: StagePlan, place: str, rate: float, loss_of: LossOfStep) -> float:
        optimizer = self.optimizer
        assert optimizer is not None  # a turn that has steps trains something
        try:
            loss = loss_of(self.position.step)
        except FloatingPointError as error:  # of the network; what it advises is for images, not for training
            raise self._diverged(plan, place, "the network's output became NaN or infinite") from error
        value = self.context.workers.mean(loss.detach())
        if not math.isfinite(value):
            raise self._diverged(plan, place, f"the loss is {value}")
        for group in optimizer.param_groups:
            group["lr"] = group["relative"] * rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.context.workers.average_gradients(parameters)
        if not all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None):
            raise self._diverged(plan, place, "a gradient is not finite")
        optimizer.step()
        keep_zero_inside(self.layers.values())
        return value

    def _diverged(self, plan: StagePlan, place: str, what: str) -> FloatingPointError:
        path = self.state.path
        kept = f"{path} has the state before it. " if path and path.exists() else ""
        return FloatingPointError(
            f"step {self.position.step} of {plan.stage.name}, {place}: {what}. {kept}Begin another run with a smaller learning"
            f" rate than {plan.stage.lr:g} (stages.{plan.index}.lr of the recipe)"
            + (f"; it can start from this one's parameters, {path.parent}" if path and kept else "")
        )

    def save(self) -> None:
        """Writes the state, where the run has one."""
        if self.state.path is None or not self.context.workers.is_main:
            return
        entries = {
            "stage_index": self.position.stage,
            "turn_index": self.position.turn,
            "step": self.position.step,
            "losses": self.result.losses,
            "turns": self.result.turns,
            "errors_before": self.result.errors_before,
            "sensitivities": self.result.sensitivities,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
        }
        save_calibration(self.state.path, self.layers, self.state.identity, entries)

    def restore(self) -> None:
        """Takes up the state's position, parameters and optimizer; see `load_calibration` for what is raised."""
        assert self.state.path is not None
        entries = load_calibration(self.state.path, self.layers, self.state.identity)
        self.position = Position(entries["stage_index"], entries["turn_index"], entries["step"])
        self.result.losses, self.result.turns = entries["losses"], entries["turns"]
        self.result.errors_before = entries["errors_before"]
        self.result.sensitivities = entries.get("sensitivities", {})  # states of earlier versions have none
        self._optimizer_state = entries["optimizer"]


class ColumnAdam(torch.optim.Adam):
    """Adam; where a group has "columns" (C,), steps of its parameters (.., C) are multiplied by them.

    A layer's quantizer sees weights divided by phi. Steps of one size would be far too large for channels with a small phi.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        scaled = [(p, group["columns"], p.clone()) for group in self.param_groups if "columns" in group for p in group["params"]]
        result = super().step(closure)
        for parameter, columns, before in scaled:
            parameter.copy_(before + (parameter - before) * columns)
        return result


def step_size(layer: CalibratingMixin, name: str) -> float:
    """What a learning rate of 1 means for a parameter: about its own size."""
    parameter = layer.get_parameter(name)
    size = float(parameter.detach().abs().mean())
    if "log_" in name:
        return 1.0  # trained in the logarithm: already relative
    if name == "adapter_up":  # starts at 0: measured by the change of the weight that it brings
        size = float(layer.weight.float().abs().mean()) * math.sqrt(layer.adapter_down.shape[1] / layer.adapter_down.shape[0])
    elif name == "adapter_down":
        size *= 0.1
    elif name == "weight_change":  # starts at 0: measured by what is quantized
        size = float(layer.residual_weight().detach().abs().mean())
    elif name == "branch_down" and has_any(layer, ("residual",)):
        size = float((parameter / layer.smooth).detach().abs().mean())
    elif name == "bias_change" and layer.bias is not None:  # starts at 0
        size = float(layer.bias.abs().mean())
    elif name == "input_offset" and "input_upper" in layer._parameters:  # may start at 0: measured by the range of the input
        size = float((layer.input_upper - layer.input_lower).abs()) * float((-layer.log_smooth).exp().mean()) * 0.1
    return max(size, 1e-6)


def has_any(layer: CalibratingMixin, train: tuple[str, ...]) -> bool:
    """Whether the layer has a parameter of one of these kinds, names as in `PARAMETERS`."""
    return any(layer._parameters.get(name) is not None for kind in train for name in PARAMETERS[kind])


def parameter_groups(
    layers: Iterable[CalibratingMixin], train: tuple[str, ...], known: set[int], rates: Mapping[str, float] = NO_RATES
) -> list[dict]:
    """Optimizer groups, one a parameter, with the size of its step as "relative".

    Args:
        train: names as in `PARAMETERS`.
        rates: factor of that size, by the names in ``train``; 1 where there is none.
        known: ids of parameters that are trained already, or shared with a layer before; extended by those found.
    """
    groups = []
    for layer in layers:
        for kind in train:
            for name in PARAMETERS[kind]:
                parameter = layer._parameters.get(name)
                if parameter is None or id(parameter) in known:
                    continue
                known.add(id(parameter))
                parameter.requires_grad_(True)
                size = step_size(layer, name) * rates.get(kind, 1.0)
                groups.append({"params": [parameter], "lr": size, "relative": size})
                if name in ("weight_change", "branch_down") and has_any(layer, ("residual",)):
                    groups[-1]["columns"] = layer.smooth.detach().clone()
    return groups


@torch.no_grad()
def keep_zero_inside(layers: Iterable[CalibratingMixin]) -> None:
    """Puts bounds that crossed 0 back onto it: beyond, quantization treats them as 0 and no gradient would bring them back."""
    for layer in layers:
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("_lower"):
                parameter.clamp_(max=0)
            elif name.endswith("_upper"):
                parameter.clamp_(min=0)
