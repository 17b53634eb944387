"""The trainer with the phase ``photo``: the model learns what people would choose, from photographs and from another upscaler."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from calibration.teacher.perceptual.distilled_pairs import DistilledPairs
from calibration.teacher.perceptual.losses import PhotoLosses
from calibration.teacher.perceptual.settings import PHOTO, PhotoSettings
from qartsr_pipeline.calibration.data.pairs import Pair, sample_pair
from qartsr_pipeline.calibration.perceptual import Lpips
from qartsr_pipeline.calibration.retraining.losses import image_quality
from qartsr_pipeline.calibration.retraining.settings import Phase
from qartsr_pipeline.calibration.retraining.trainer import Trainer, load_state

logger = logging.getLogger(Trainer.__module__)  # the training commands show its lines


@dataclass
class PhotoTrainer(Trainer):
    """Phases other than ``photo`` are the `Trainer`'s.

    Attributes:
        real: held-out pairs under real degradation; `data.held_out` are those under bicubic reduction. Each kind is validated by
            itself: the mean of both would hide what happens to clean images.
        distilled: see `PhotoSettings.distilled`.
    """

    photo: PhotoSettings = field(default_factory=lambda: PhotoSettings(lpips=0))
    real: list[Pair] = field(default_factory=list)
    distilled: DistilledPairs | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        device = self.model.device
        self.losses = PhotoLosses(self.photo, self.settings.seed, device)
        self.measure = Lpips("alex", self.photo.alex).to(device) if self.photo.alex else None
        self._photographs = 0  # so many images of this step's batch, the first, are photographs
        self._seen: tuple[torch.Tensor, torch.Tensor] | None = None  # this step's photographs and images, for the discriminator
        self._warned = False

    def resume(self) -> None:
        """As the base class; a discriminator that the state has none of starts afresh."""
        super().resume()
        state = load_state(self.state_path, self.model.device)
        self.losses.smooth = dict(state.get("terms", {}))
        adversary = state.get("adversary")
        if self.losses.adversary and adversary and adversary["kind"] == self.photo.discriminator:
            self.losses.adversary.restore(adversary)

    def _further_state(self) -> dict[str, Any]:
        adversary = self.losses.adversary
        kept = {"kind": self.photo.discriminator, **adversary.state()} if adversary else None
        return {"terms": self.losses.smooth, "adversary": kept}

    def _trained_modules(self, phase: Phase) -> list[torch.nn.Module]:
        return [self.model.vae, self.model.unet] if phase.name == PHOTO else super()._trained_modules(phase)

    def _batch(self, phase: Phase, rng: np.random.Generator) -> Pair:
        """The photographs come first."""
        self._photographs = phase.batch
        if phase.name != PHOTO:
            return super()._batch(phase, rng)
        count = int(phase.batch * self.photo.distilled_share + rng.random()) if self.distilled else 0
        self._photographs = phase.batch - count
        parts = []
        if self._photographs:
            parts.append(sample_pair(self.data.patches, self._photographs, phase.patch, rng, self.settings.degradation))
        if self.distilled and count:
            parts.append(self.distilled.sample(count, phase.patch, rng))
        up, high = (torch.cat(images).contiguous(memory_format=torch.channels_last) for images in zip(*parts, strict=True))
        return up, high

    def _loss(self, phase: Phase, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        if phase.name != PHOTO:
            return super()._loss(phase, up, high)
        image = self.model(up).float()
        loss = self.losses(image, high, self._photographs, self.step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"{self._diverged(float(loss.detach()))}; its terms: {self._terms()}")
        self._seen = high[: self._photographs], image[: self._photographs].detach()
        return loss

    def _before_step(self, phase: Phase) -> None:
        """The discriminator's step: first, so that nothing has changed if it fails."""
        adversary = self.losses.adversary
        if phase.name != PHOTO or adversary is None or self._seen is None or not self._photographs:
            return
        try:
            with torch.autocast(self._seen[0].device.type, dtype=torch.bfloat16, enabled=self.settings.bf16):
                adversary.learn(*self._seen)
        except FloatingPointError as error:
            raise FloatingPointError(f"{self._diverged(float('nan'))}; {error}; --adversarial 0 leaves it out") from error
        if adversary.has_won and not self._warned:
            self._warned = True
            logger.warning(
                "the discriminator has won (its loss: %.3f): the adversarial term teaches nothing now. Stop, and resume with a"
                " lower --discriminator-lr or a larger --adversarial",
                adversary.smooth_loss,
            )

    def _terms(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.losses.smooth.items())

    def _scores(self, phase: Phase) -> dict[str, float]:
        """PSNR-Y and, with AlexNet at hand, LPIPS of mildly and of really degraded images apart, and the loss' terms."""
        if phase.name != PHOTO:
            return super()._scores(phase)
        scores: dict[str, float] = {}
        for suffix, pairs in (("", self.data.held_out), ("_real", self.real)):
            rows = [self._score(*pair) for pair in pairs]
            scores |= {f"{name}{suffix}": float(np.mean([row[name] for row in rows])) for name in (rows[0] if rows else {})}
        scores |= {f"loss_{name}": value for name, value in self.losses.smooth.items()}
        if self.losses.adversary and self.losses.adversary.smooth_loss is not None:
            scores["loss_discriminator"] = self.losses.adversary.smooth_loss
        return scores

    @torch.no_grad()
    def _score(self, up: torch.Tensor, high: torch.Tensor) -> dict[str, float]:
        up, high = (image.to(self.model.device) for image in (up, high))
        made = self.model(up).clamp(-1, 1)
        row = {"bicubic": image_quality(up, high), "model": image_quality(made, high)}
        if self.measure:
            row |= {"lpips_bicubic": float(self.measure(up, high)), "lpips": float(self.measure(made, high))}
        return row
