"""Runs the phases of the small model's training: optimizer, moving average, validation, saving."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from qartsr_pipeline.calibration.data.pairs import Pair, Patches, sample_pair
from qartsr_pipeline.calibration.retraining.adapters import trained_parameters
from qartsr_pipeline.calibration.retraining.losses import Perceptual, loss_of, set_scaling_factor, trained_modules, validate
from qartsr_pipeline.calibration.retraining.one_step_model import Teacher
from qartsr_pipeline.calibration.retraining.plots import plot_if_possible
from qartsr_pipeline.calibration.retraining.settings import Phase, Settings
from qartsr_pipeline.calibration.training.training_state import STATE_NAME, StopSignals, load_state, save_state, write_whole


@dataclass
class Trainer:
    """One run. Step i of phase p depends only on the weights, the seed, p and i: stopping and resuming changes nothing.

    Attributes:
        record: what the state shall say about the data and versions; see `calibration/teacher/export.py`.
        perceptual: see `teacher_losses.loss_of`.
        average: moving average of the weights; what is validated and exported.
    """

    model: Teacher
    phases: list[Phase]
    patches: Patches
    held_out: list[Pair]
    settings: Settings
    record: dict[str, Any] = field(default_factory=dict)
    perceptual: Perceptual | None = None

    def __post_init__(self) -> None:
        self.phase_index, self.step = 0, 0
        self.smooth_loss: float | None = None
        self.history: list[dict[str, Any]] = []
        self.average = self._weights()
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def state_path(self) -> Path:
        return self.settings.output / STATE_NAME

    @property
    def place(self) -> str:
        """How far the run is, in words."""
        if self.phase_index == len(self.phases):
            return "the end of training"
        return f"step {self.step} of phase {self.phases[self.phase_index].name!r}"

    def _weights(self) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in self.model.state_dict().items()}

    def save(self) -> None:
        """Writes state.pt, history.json and, where matplotlib is installed, training.png to the output folder."""
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
        }
        save_state(self.state_path, state)
        write_whole(self.settings.output / "history.json", json.dumps(self.history, indent=1).encode())
        plot_if_possible(self.history, self.settings.output / "training.png")

    def resume(self) -> None:
        """Continues from the output folder's state.

        Raises:
            FileNotFoundError, ValueError: no usable state there, or its phases so far are not those of this run.
        """
        state = load_state(self.state_path, str(self.model.scaling_factor.device))
        begun = state["phase_index"] + (state["step"] > 0)
        names = [phase["name"] for phase in state["phases"]][:begun]
        if names != [phase.name for phase in self.phases][:begun]:
            raise ValueError(f"{self.state_path} was trained in the phases {', '.join(names)}: --phases must begin with these")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.phase_index, self.step, self.history = state["phase_index"], state["step"], state["history"]
        self.smooth_loss = state.get("smooth_loss")
        if self.phase_index < len(self.phases) and state["optimizer"]:
            self._start_phase(self.phases[self.phase_index])
            self.optimizer.load_state_dict(state["optimizer"])

    def run(self) -> bool:
        """Trains to the end and returns True; or, when asked to stop, to the end of the step, saves, and returns False.

        Raises:
            FloatingPointError: the loss is no number any more. SavingError: disk full.
        """
        with StopSignals() as stop:
            while self.phase_index < len(self.phases):
                phase = self.phases[self.phase_index]
                if self.optimizer is None:
                    self._start_phase(phase)
                self._train(phase, stop)
                if self.step >= phase.steps:
                    self._finish_phase(phase)
                if stop.requested and self.phase_index < len(self.phases):
                    self.save()
                    return False
        return True

    def _start_phase(self, phase: Phase) -> None:
        self.model.requires_grad_(False)
        parameters = trained_parameters(trained_modules(phase.name, self.model, self.settings.train_encoder))
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(parameters, lr=phase.lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def _train(self, phase: Phase, stop: StopSignals) -> None:
        with tqdm(total=phase.steps, initial=self.step, desc=phase.name, mininterval=5) as bar:
            while self.step < phase.steps and not stop.requested:
                loss = self._train_step(phase)
                self.step += 1
                self.smooth_loss = loss if self.smooth_loss is None else 0.98 * self.smooth_loss + 0.02 * loss
                bar.update()
                if self.step % self.settings.every == 0 or self.step == phase.steps:
                    self._validate(phase)
                    self.save()

    def _learning_rate(self, phase: Phase) -> float:
        warm_up = min(1.0, (self.step + 1) / 100)
        return phase.lr * warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / phase.steps)))

    def _train_step(self, phase: Phase) -> float:
        rng = np.random.default_rng([self.settings.seed, self.phase_index, self.step])
        torch.manual_seed(int(rng.integers(2**31)))
        device = self.model.scaling_factor.device
        pair = sample_pair(self.patches, phase.batch, phase.patch, rng, self.settings.degradation)
        up, high = (picture.to(device) for picture in pair)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
            loss = loss_of(phase.name, self.model, up, high, self.settings.train_encoder, self.settings.loss, self.perceptual)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise FloatingPointError(self._diverged(float(loss.detach())))
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(phase)
        self.optimizer.step()
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for key, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[key].lerp_(value, 1 - decay)
        return float(loss.detach())

    def _diverged(self, loss: float) -> str:
        way_out = f"the last good state is kept in {self.state_path}: continue from it with --resume and a lower learning rate"
        if not self.state_path.exists():
            way_out = "nothing was saved yet: start again with a lower learning rate"
        return f"training diverged at {self.place}: the loss is {loss}, or its gradient is not finite; {way_out} in --phases"

    def _validate(self, phase: Phase) -> None:
        live = self._weights()
        self.model.load_state_dict(self.average)
        scores = validate(self.model, self.held_out)
        self.model.load_state_dict(live)
        row = {"phase": phase.name, "step": self.step, "loss": self.smooth_loss, "seconds": time.time(), **scores}
        self.history.append(row)
        shown = {"loss": self.smooth_loss, **scores}
        tqdm.write(f"{phase.name} {self.step}  " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def _finish_phase(self, phase: Phase) -> None:
        self.model.load_state_dict(self.average)
        if phase.name == "autoencoder":
            set_scaling_factor(self.model, self.patches)
            self.average = self._weights()
        self.phase_index, self.step, self.optimizer, self.smooth_loss = self.phase_index + 1, 0, None, None
        self.save()
