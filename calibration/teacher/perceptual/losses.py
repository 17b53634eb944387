"""The terms of the photo phase's loss, and the discriminator that one of them asks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from calibration.teacher.perceptual.discriminator import DISCRIMINATORS, discriminator_loss, generator_loss
from calibration.teacher.perceptual.settings import PhotoSettings
from qartsr_pipeline.calibration.perceptual import Dists, Lpips

WON = 0.02  # of the discriminator's loss: below, it tells every image, and its gradient says nothing any more


class Adversary:
    """A discriminator with its optimizer.

    Attributes:
        smooth_loss: moving average of its loss; log 2 = 0.69 where it cannot tell, 0 where it always can.
    """

    def __init__(self, settings: PhotoSettings, seed: int, device: torch.device | str):
        self.model = DISCRIMINATORS[settings.discriminator](seed=seed).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.discriminator_lr, betas=(0.9, 0.99))
        self.smooth_loss: float | None = None

    def verdict_loss(self, image: torch.Tensor) -> torch.Tensor:
        """The model's share: gradients reach the image, not the discriminator."""
        self.model.requires_grad_(False)
        loss = generator_loss(self.model(image))
        self.model.requires_grad_(True)
        return loss

    def learn(self, photographs: torch.Tensor, made: torch.Tensor) -> float:
        """Its own step; returns its loss.

        Raises:
            FloatingPointError: loss or gradient is no finite number; nothing was changed.
        """
        loss = discriminator_loss(self.model(photographs), self.model(made.detach()))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise FloatingPointError(f"the discriminator's loss is {float(loss.detach())}, or its gradient is not finite")
        self.optimizer.step()
        value = float(loss.detach())
        self.smooth_loss = value if self.smooth_loss is None else 0.98 * self.smooth_loss + 0.02 * value
        return value

    @property
    def has_won(self) -> bool:
        """Its loss lies flat at zero: the adversarial term teaches nothing any more."""
        return self.smooth_loss is not None and self.smooth_loss < WON

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "smooth_loss": self.smooth_loss}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.smooth_loss = state["smooth_loss"]


class PhotoLosses:
    """Adds the terms up.

    Attributes:
        smooth: moving average of every term without its weight, by name; for the plots.
    """

    def __init__(self, settings: PhotoSettings, seed: int = 0, device: torch.device | str = "cpu"):
        self.settings = settings
        self.lpips = Lpips("vgg", settings.backbone, settings.stages).to(device) if settings.lpips else None
        self.dists = Dists(settings.backbone).to(device) if settings.dists else None
        self.adversary = Adversary(settings, seed, device) if settings.adversarial else None
        self.smooth: dict[str, float] = {}

    def __call__(self, image: torch.Tensor, high: torch.Tensor, photographs: int) -> torch.Tensor:
        """The loss of one batch, a scalar.

        Args:
            image, high: the model's output and its target, (B, 3, P, P) in [-1, 1].
            photographs: so many targets, the first, are photographs; the others are another upscaler's images.
        """
        settings = self.settings
        terms = {"l1": F.l1_loss(image, high)}
        if self.lpips:
            terms["lpips"] = self.lpips(image, high)
        if self.dists:
            terms["dists"] = self.dists(image, high)
        if self.adversary and photographs:
            terms["adversarial"] = self.adversary.verdict_loss(image[:photographs])
        for name, value in terms.items():
            number = float(value.detach())
            self.smooth[name] = 0.98 * self.smooth.get(name, number) + 0.02 * number
        return sum(getattr(settings, name) * value for name, value in terms.items())
