"""What each phase of retraining trains, on which loss, and how the model is validated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from qartsr_pipeline.calibration.data.pairs import Pair, sample_pair
from qartsr_pipeline.calibration.data.patches import Patches
from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel
from qartsr_pipeline.calibration.retraining.settings import Settings
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.image.metrics import psnr_y

Term = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
DISTANCES: dict[str, Term] = {"l1": F.l1_loss, "l2": F.mse_loss}


class PhaseLoss:
    """The loss of one batch in each phase.

    Args:
        perceptual: added, as it is, to the distance between images.

    Attributes:
        distance: between latents in the phase "latent".
        image_terms: name -> (image, target) -> scalar, with images (B, 3, P, P) in [-1, 1]; their sum is the loss of "pixel" and
            "joint".
    """

    def __init__(self, settings: Settings, perceptual: Perceptual | None = None) -> None:
        self.distance = DISTANCES[settings.loss]
        self.train_encoder = settings.train_encoder
        self.image_terms: dict[str, Term] = {"distance": self.distance}
        if perceptual is not None:
            self.image_terms["perceptual"] = perceptual

    def __call__(self, phase: str, model: OneStepModel, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """A scalar, for input ``up`` and target ``high``, both (B, 3, P, P) in [-1, 1]; ``phase`` is one of `settings.PHASES`."""
        if phase == "autoencoder":
            return autoencoder_loss(model, up, high)
        if phase == "latent":
            with torch.no_grad():
                source, target = model.encode(up), model.encode(high).float()
            return self.distance(model.step(source).float(), target)
        with torch.set_grad_enabled(self.train_encoder or phase == "joint"):
            source = model.encode(up)
        image = model.decode(model.step(source)).float()
        first, *further = (term(image, high) for term in self.image_terms.values())
        loss = sum(further, first)
        if phase == "joint":
            half = max(1, high.shape[0] // 2)  # so that the autoencoder stays good, and leaves restoring the input to the UNet
            loss = loss + autoencoder_loss(model, up[:half], high[:half])
        return loss


def autoencoder_loss(model: OneStepModel, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """L1 distance of reconstructions, of targets in three quarters of the batch and of inputs in the rest, and a little of the
    posterior's KL divergence from a standard normal distribution.
    """
    targets = high.shape[0] * 3 // 4
    x = torch.cat([high[:targets], up[targets:]])
    posterior = model.vae.encode(x).latent_dist
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return F.l1_loss(model.vae.decode(posterior.sample()).sample.float(), x) + 1e-5 * kl.float()


def trained_modules(phase: str, model: OneStepModel, train_encoder: bool) -> list[torch.nn.Module]:
    """What a phase trains; everything else is frozen."""
    if phase == "autoencoder":
        return [model.vae]
    if phase == "joint":
        return [model.vae, model.unet]
    encoder = (model.vae.encoder, model.vae.quant_conv) if train_encoder and phase == "pixel" else ()
    return [model.unet, *(part for part in encoder if part is not None)]


@torch.no_grad()
def validate(model: OneStepModel, pairs: list[Pair]) -> dict[str, float]:
    """Mean PSNR-Y in dB over held-out patches, without colour alignment.

    "model" is the model's; "bypass" leaves its UNet out (z_H = z_L); "autoencoder" reproduces the target; "bicubic" is the
    input's.
    """
    rows = []
    for up, high in pairs:
        z = model.encode(up.to(model.device))
        results = {
            "bicubic": up,
            "model": model.decode(model.step(z)),
            "bypass": model.decode(z),
            "autoencoder": model.decode(model.encode(high.to(model.device))),
        }
        rows.append({name: image_quality(result, high) for name, result in results.items()})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def image_quality(image: torch.Tensor, target: torch.Tensor) -> float:
    """PSNR-Y in dB of (B, 3, H, W), both in [-1, 1] and clamped to it."""
    return psnr_y(_unit(image), _unit(target))


def _unit(image: torch.Tensor) -> torch.Tensor:
    return (image.float().clamp(-1, 1) + 1) / 2


@torch.no_grad()
def set_scaling_factor(model: OneStepModel, patches: Patches) -> None:
    """Sets the scaling factor with which latents of training images have unit variance; Stable Diffusion's is 0.18215."""
    _, high = sample_pair(patches, 32, 128, np.random.default_rng(0))
    model.scaling_factor.fill_(1 / float(model.vae.encode(high.to(model.device)).latent_dist.mode().std()))
