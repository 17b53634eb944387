"""QAO of LSGQuant (arXiv 2602.03182): the quantized weight and the low-rank branch of a layer are refined together.

    y = L1 L2 x + Q_W(W_R H^T) Q_X(H x) + b

W_R, through its quantizer, L1 and L2 are trained; H and b are not. The paper does not say how they are trained, so this is our
reading: layer after layer, the most sensitive first, each by itself on recordings of its full-precision input and output, with
the steps that VOLTS gives it (`volts`). The loss is |y_q - y| / |y|. The distance of z_H,q from z_H,fp, of the transformer as a
whole, is the loss of a stage of its own, behind this one (``noise_l2``: z_H = z_L - sigma v).

A layer is trained in rounds, each with a learning rate that falls to 0. A quarter of the recordings is held out and judges: a
round that raises their error is taken back, and the next one is slower; one that hardly lowers it is the last. So no layer leaves
worse than it came.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from qartsr_pipeline.calibration.start.observers import InputSample
from qartsr_pipeline.calibration.training.calibration_state import quantization_parameters
from qartsr_pipeline.calibration.training.losses import relative_l2
from qartsr_pipeline.calibration.training.progress import Step, Stopped
from qartsr_pipeline.calibration.training.steps import (
    WARM_UP,
    ColumnAdam,
    StagePlan,
    Training,
    keep_zero_inside,
    parameter_groups,
)
from qartsr_pipeline.calibration.training.volts import HIGH
from qartsr_pipeline.quantization.calibrating import CalibratingMixin

HELD_OUT = 4  # one position in so many judges
ROWS = 1024  # positions a step
SLOWER, SLOWEST = (
    1 / 4,
    1 / 64,
)  # factor of the learning rate after a round that was taken back, and the smallest product of these


@dataclass(frozen=True)
class Recorded:
    """Inputs (positions, C) of a linear layer and what it makes of them at full precision, (positions, N)."""

    inputs: torch.Tensor
    outputs: torch.Tensor

    @torch.no_grad()
    def error(self, layer: CalibratingMixin) -> float:
        """|y_q - y|^2 / |y|^2."""
        return float((layer(self.inputs) - self.outputs).square().sum() / self.outputs.square().sum().clamp(min=1e-12))


@torch.no_grad()
def recorded(layer: CalibratingMixin, sample: InputSample) -> tuple[Recorded, Recorded]:
    """What the layer is trained on, and what is held out; the same where there are too few positions to divide them."""
    rows = sample.rows
    whole = Recorded(rows, F.linear(rows, layer.weight.float(), None if layer.bias is None else layer.bias.float()))
    if len(rows) < HELD_OUT:
        return whole, whole
    held = torch.arange(len(rows), device=rows.device) % HELD_OUT == HELD_OUT - 1
    return Recorded(rows[~held], whole.outputs[~held]), Recorded(rows[held], whole.outputs[held])


def refine_layers(training: Training, plan: StagePlan, samples: dict[str, InputSample]) -> None:
    """The whole stage, from the position on that the training is at: a turn is one layer, and begins anew if it was interrupted.

    Raises:
        Stopped: asked to; saved. FloatingPointError: the loss became NaN or infinite; the last saved state is kept.
    """
    result, stage, volts = training.result, plan.stage, training.context.recipe.volts
    losses = result.losses.setdefault(stage.name, [])
    saved_at = len(losses)
    for block in training.blocks:
        block.quantize(True)
    for number, turn in enumerate(plan.turns):
        name, layer = turn.name, turn.blocks[0].layers[0]
        steps, entry = plan.steps[number], result.sensitivities[name]
        if number < training.position.turn:
            continue
        high_ones_left = sum(result.sensitivities[later.name]["kind"] == HIGH for later in plan.turns[number:])
        if entry["kind"] == HIGH:  # what those before it did not need
            steps += max(0, sum(plan.steps[:number]) - len(losses)) // high_ones_left
        rounds = _Rounds(training, plan, number, recorded(layer, samples[name]))
        first, begun, before = rounds.least, len(losses), quantization_parameters({name: layer})
        before = {key: value.clone() for key, value in before.items()}
        worth_it, stop = True, False
        while rounds.done < steps and worth_it and not stop:
            worth_it = rounds.run(layer, min(volts.medium_steps, steps - rounds.done), losses, volts.converged)
            stop = training.context.workers.anyone(training.stop.requested)
        if rounds.done < steps and worth_it:  # interrupted
            for key, parameter in quantization_parameters({name: layer}).items():
                parameter.copy_(before[key])
            del losses[begun:]
        else:
            training.position.turn = number + 1
            entry["steps"] = rounds.done
            if rounds.done:
                result.turns.append({"stage": stage.name, "module": name, "first": first, "last": rounds.least})
        if stop or (training.state.every and len(losses) - saved_at >= training.state.every):
            training.save()
            saved_at = len(losses)
        if stop:
            raise Stopped(f"stopped after step {training.done} of {training.total}")
    training.next_stage()


class _Rounds:
    """The rounds of one layer.

    Attributes:
        done: steps so far. least: error on what is held out. pace: factor of the learning rate.
    """

    def __init__(self, training: Training, plan: StagePlan, number: int, data: tuple[Recorded, Recorded]) -> None:
        self.training, self.plan, self.number = training, plan, number
        self.data, self.held = data
        self.done, self.pace = 0, 1.0
        self.least = self.held.error(plan.turns[number].blocks[0].layers[0])

    def run(self, layer: CalibratingMixin, steps: int, losses: list[float], converged: float) -> bool:
        """One round; returns whether another one is worth it."""
        stage, name = self.plan.stage, self.plan.turns[self.number].name
        for other in self.training.layers.values():
            other.requires_grad_(False)
        groups = parameter_groups([layer], stage.train, set(), stage.rates)
        optimizer = ColumnAdam(groups, betas=(0.9, 0.95))
        trained = [parameter for group in groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in trained]
        rng = np.random.default_rng([self.training.context.seed, self.plan.index, self.number, self.done])
        for step in range(steps):
            chosen = torch.from_numpy(rng.permutation(len(self.data.inputs))[:ROWS])
            loss = relative_l2(layer(self.data.inputs[chosen])[None], self.data.outputs[chosen][None])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._check_finite(name, loss, trained)
            rate = self.pace * stage.lr * min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = group["relative"] * rate
            optimizer.step()
            keep_zero_inside([layer])
            losses.append(float(loss.detach()))
            self.done += 1
            made = Step(self.training.done, self.training.total, losses[-1], f"{stage.name} {name}")
            if self.training.context.progress.stepped(made):
                self.training.stop.requested = True
        layer.requires_grad_(False)
        error = self.held.error(layer)
        if not error < self.least:
            with torch.no_grad():
                for parameter, value in zip(trained, before, strict=True):
                    parameter.copy_(value)
            self.pace *= SLOWER
            return self.pace >= SLOWEST
        worth_it = error < (1 - converged) * self.least
        self.least = error
        return worth_it

    def _check_finite(self, name: str, loss: torch.Tensor, trained: list[torch.nn.Parameter]) -> None:
        if not (loss.isfinite() and all(bool(p.grad.isfinite().all()) for p in trained if p.grad is not None)):
            raise FloatingPointError(
                f"{self.plan.stage.name}, {name}: the loss or a gradient became NaN or infinite. Begin another run with a smaller"
                f" learning rate than {self.plan.stage.lr:g} (stages.{self.plan.index}.lr of the recipe)."
            )
