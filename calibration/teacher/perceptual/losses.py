"""The terms of the photo phase's loss, and the discriminator that one of them asks.

A discriminator tells photographs from the model's images: it pulls texture out of a model that pixel losses make smooth. Both
kinds give a verdict for each place that they see, not for the image. Spectral normalization (arXiv 1802.05957) bounds their
slope, so that a small weight of the adversarial term stays small.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from calibration.teacher.perceptual.settings import TERMS, PhotoSettings
from qartsr_pipeline.calibration.perceptual import Dists, Lpips

SLOPE = 0.2  # of the discriminators' LeakyReLU
WON = 0.02  # of the discriminator's loss: below, it tells every image, and its gradient says nothing any more


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> verdicts (B, 1, H / 8, W / 8), the higher the more like a photograph; sees about 80 pixels.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 32, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (3, width, 2 * width, 4 * width)
            layers = [nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1) for i in range(3)]
            layers.append(nn.Conv2d(widths[3], widths[3], 3, 1, 1))
            self.layers = nn.ModuleList(spectral_norm(layer) for layer in layers)
            self.last = nn.Conv2d(widths[3], 1, 3, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            image = F.leaky_relu(layer(image), SLOPE)
        return self.last(image)


class UNetDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> a verdict for every pixel, (B, 1, H, W), as Real-ESRGAN's: it also says where.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 24, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, width, 3, 1, 1)
            pairs = [(width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)]
            self.down = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, 2, 1, bias=False)) for a, b in pairs)
            self.up = nn.ModuleList(spectral_norm(nn.Conv2d(b, a, 3, 1, 1, bias=False)) for a, b in reversed(pairs))
            self.last = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.first(image), SLOPE)
        seen = []
        for layer in self.down:
            seen.append(x)
            x = F.leaky_relu(layer(x), SLOPE)
        for layer in self.up:
            skip = seen.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(layer(x), SLOPE) + skip
        return self.last(x)


DISCRIMINATORS = {"patch": PatchDiscriminator, "unet": UNetDiscriminator}


def generator_loss(verdicts: torch.Tensor) -> torch.Tensor:
    """How surely the model's images were recognized, a scalar above 0; log 2 where the discriminator cannot tell."""
    return F.softplus(-verdicts.float()).mean()


def discriminator_loss(photographs: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The mean of both kinds' cross-entropy, a scalar above 0; log 2 where it cannot tell, 0 where it always can."""
    return (F.softplus(-photographs.float()).mean() + F.softplus(made.float()).mean()) / 2


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
        self.distances: dict[str, nn.Module] = {}
        if settings.lpips:
            self.distances["lpips"] = Lpips("vgg", settings.backbone, settings.stages).to(device)
        if settings.dists:
            self.distances["dists"] = Dists(settings.backbone).to(device)
        if settings.lpips_alex:
            self.distances["lpips_alex"] = Lpips("alex", settings.alex).to(device)
        self.adversary = Adversary(settings, seed, device) if settings.adversarial else None
        self.smooth: dict[str, float] = {}

    def __call__(self, image: torch.Tensor, high: torch.Tensor, photographs: int, step: int = 0) -> torch.Tensor:
        """The loss of one batch, a scalar.

        Args:
            image, high: the model's output and its target, (B, 3, P, P) in [-1, 1].
            photographs: so many targets, the first, are photographs; the others are another upscaler's images.
            step: decides, with `PhotoSettings.in_turn`, which of the two terms that look through VGG16 has its turn.
        """
        settings = self.settings
        weights = {name: getattr(settings, name) for name in TERMS}
        if settings.in_turn:
            turn, rests = ("lpips", "dists") if step % 2 == 0 else ("dists", "lpips")
            weights[turn], weights[rests] = 2 * weights[turn], 0.0
        terms = {"l1": F.l1_loss(image, high)}
        terms |= {name: distance(image, high) for name, distance in self.distances.items() if weights[name]}
        if self.adversary and photographs:
            terms["adversarial"] = self.adversary.verdict_loss(image[:photographs])
        for name, value in terms.items():
            number = float(value.detach())
            self.smooth[name] = 0.98 * self.smooth.get(name, number) + 0.02 * number
        return sum(weights[name] * value for name, value in terms.items())
