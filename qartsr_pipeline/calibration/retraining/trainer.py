"""Runs the phases of retraining: optimizer, moving average, validation, saved states."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline.calibration.data.pairs import Pair, TrainingSet, sample_pair
from qartsr_pipeline.calibration.retraining.losses import PhaseLoss, set_scaling_factor, trained_modules, validate
from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel, trained_parameters
from qartsr_pipeline.calibration.retraining.report import plot_if_possible
from qartsr_pipeline.calibration.retraining.settings import Phase, Settings
from qartsr_pipeline.calibration.saving import load_tensors, save_tensors
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.progress import SILENT, Progress, Step, StopSignals
from qartsr_pipeline.whole_files import write_whole

STATE_NAME = "state.pt"
ENTRIES = {"model", "average", "phase_index", "step", "history", "phases"}
logger = logging.getLogger(__name__)  # one line a validation


def load_state(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a training state; only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError: there is no file. ValueError: it is damaged, or no training state.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no training state {str(path)!r}: a training run writes one to its output folder")
    state = load_tensors(path, "a training state", f"restore it, or remove {path} to begin anew", device)
    missing = ENTRIES - state.keys() if isinstance(state, dict) else ENTRIES
    if missing:
        raise ValueError(f"{path} is no training state: it lacks the entries {', '.join(sorted(missing))}")
    return state


@dataclass
class Trainer:
    """One run. Step i of phase p depends only on the weights, the seed, p and i: stopping and resuming changes nothing.

    A subclass adds phases of its own by overriding `_trained_modules`, `_batch`, `_loss`, `_before_step`, `_scores` and
    `_further_state`, and restricts what is continued by overriding `_check`.

    Args:
        output: folder of the state, the history and the curves.
        record: what the state says of the data and versions.
        perceptual: see `losses.PhaseLoss`.
        progress: called after every step with the steps of all phases; see `Progress`.

    Attributes:
        average: moving average of the weights; this is validated and exported.
        history: a row for each validation.
    """

    model: OneStepModel
    phases: list[Phase]
    data: TrainingSet
    settings: Settings
    output: Path
    record: dict[str, Any] = field(default_factory=dict)
    perceptual: Perceptual | None = None
    progress: Progress = SILENT

    def __post_init__(self) -> None:
        self.loss = PhaseLoss(self.settings, self.perceptual)
        self.phase_index, self.step = 0, 0
        self.smooth_loss: float | None = None
        self.history: list[dict[str, Any]] = []
        self.average = self._weights()
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def state_path(self) -> Path:
        return self.output / STATE_NAME

    @property
    def place(self) -> str:
        """How far the run is, in words."""
        if self.phase_index == len(self.phases):
            return "the end of training"
        return f"step {self.step} of phase {self.phases[self.phase_index].name!r}"

    def _weights(self) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}

    def save(self) -> None:
        """Writes state.pt, history.json and, where matplotlib is installed, training.png to the output folder.

        Raises:
            SavingError: the disk is full.
        """
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "phase_index": self.phase_index,
            "step": self.step,
            "smooth_loss": self.smooth_loss,
            "history": self.history,
            "phases": [asdict(phase) for phase in self.phases],
            "record": self.record,
            **self._further_state(),
        }
        save_tensors(self.state_path, state)
        write_whole(self.output / "history.json", json.dumps(self.history, indent=1).encode())
        plot_if_possible(self.history, self.output / "training.png")

    def resume(self) -> None:
        """Continues from the output folder's state.

        Raises:
            FileNotFoundError, ValueError: there is no usable state, or its phases so far are not those of this run.
        """
        state = load_state(self.state_path, self.model.device)
        self._check(state)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.phase_index, self.step, self.history = state["phase_index"], state["step"], state["history"]
        self.smooth_loss = state.get("smooth_loss")
        if self.phase_index < len(self.phases) and state["optimizer"]:
            self.optimizer = self._new_optimizer(self.phases[self.phase_index])
            self.optimizer.load_state_dict(state["optimizer"])

    def _check(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is not of this run."""
        begun = state["phase_index"] + (state["step"] > 0)
        names = [phase["name"] for phase in state["phases"]][:begun]
        if names != [phase.name for phase in self.phases][:begun]:
            raise ValueError(f"{self.state_path} was trained in the phases {', '.join(names)}: the phases must begin with these")

    def run(self) -> bool:
        """Trains to the end and returns True; or, when asked to stop, to the end of the step, saves, and returns False.

        Raises:
            FloatingPointError: the loss became NaN or infinite. SavingError: the disk is full.
        """
        with StopSignals() as stop:
            while self.phase_index < len(self.phases):
                phase = self.phases[self.phase_index]
                if self.optimizer is None:
                    self.optimizer = self._new_optimizer(phase)
                self._train(phase, self.optimizer, stop)
                if self.step >= phase.steps:
                    self._finish_phase(phase)
                if stop.requested and self.phase_index < len(self.phases):
                    self.save()
                    return False
        return True

    def _new_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """Over what the phase trains; all else is frozen."""
        self.model.requires_grad_(False)
        parameters = trained_parameters(self._trained_modules(phase))
        for parameter in parameters:
            parameter.requires_grad_(True)
        return torch.optim.AdamW(parameters, lr=phase.lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def _train(self, phase: Phase, optimizer: torch.optim.Optimizer, stop: StopSignals) -> None:
        before, total = sum(p.steps for p in self.phases[: self.phase_index]), sum(p.steps for p in self.phases)
        while self.step < phase.steps and not stop.requested:
            loss = self._train_step(phase, optimizer)
            self.step += 1
            self.smooth_loss = loss if self.smooth_loss is None else 0.98 * self.smooth_loss + 0.02 * loss
            if self.progress.stepped(Step(before + self.step, total, loss, phase.name)):
                stop.requested = True
            if self.step % self.settings.every == 0 or self.step == phase.steps:
                self._validate(phase)
                self.save()

    def _learning_rate(self, phase: Phase) -> float:
        warm_up = min(1.0, (self.step + 1) / 100)
        return phase.lr * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / phase.steps)))

    def _train_step(self, phase: Phase, optimizer: torch.optim.Optimizer) -> float:
        """One step on a batch that is a function of seed, phase and step; returns the loss."""
        rng = np.random.default_rng([self.settings.seed, self.phase_index, self.step])
        torch.manual_seed(int(rng.integers(2**31)))
        device = self.model.device
        up, high = (images.to(device) for images in self._batch(phase, rng))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
            loss = self._loss(phase, up, high)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise FloatingPointError(self._diverged(float(loss.detach())))
        self._before_step(phase)
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(phase)
        optimizer.step()
        self._update_average()
        return float(loss.detach())

    def _trained_modules(self, phase: Phase) -> list[torch.nn.Module]:
        return trained_modules(phase.name, self.model, self.settings.train_encoder)

    def _batch(self, phase: Phase, rng: np.random.Generator) -> Pair:
        """Input and target of one step."""
        return sample_pair(self.data.patches, phase.batch, phase.patch, rng, self.settings.degradation)

    def _loss(self, phase: Phase, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return self.loss(phase.name, self.model, up, high)

    def _before_step(self, phase: Phase) -> None:
        """What else is done once the gradients are known to be finite."""

    def _scores(self, phase: Phase) -> dict[str, float]:
        """What a validation measures, with the averaged weights in place."""
        return validate(self.model, self.data.held_out)

    def _further_state(self) -> dict[str, Any]:
        """Entries of the state that a subclass adds."""
        return {}

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[key].lerp_(value, 1 - decay)

    def _diverged(self, loss: float) -> str:
        way_out = f"the last good state is kept in {self.state_path}: continue from it with a lower learning rate"
        if not self.state_path.exists():
            way_out = "nothing was saved yet: start again with a lower learning rate"
        return f"training diverged at {self.place}: the loss is {loss}, or its gradient is not finite; {way_out}"

    def _validate(self, phase: Phase) -> None:
        live = self._weights()
        self.model.load_state_dict(self.average)
        scores = self._scores(phase)
        self.model.load_state_dict(live)
        self.history.append({"phase": phase.name, "step": self.step, "loss": self.smooth_loss, "seconds": time.time(), **scores})
        shown = {"loss": self.smooth_loss, **scores}
        logger.info("%s %d  %s", phase.name, self.step, "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def _finish_phase(self, phase: Phase) -> None:
        self.model.load_state_dict(self.average)
        if phase.name == "autoencoder":
            set_scaling_factor(self.model, self.data.patches)
            self.average = self._weights()
        self.phase_index, self.step, self.optimizer, self.smooth_loss = self.phase_index + 1, 0, None, None
        self.save()
