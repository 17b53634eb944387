"""What each phase of the small model's training trains, on which loss, and how it is validated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from qartsr_pipeline.calibration.data.pairs import Pair, Patches, sample_pair
from qartsr_pipeline.calibration.retraining.one_step_model import Teacher
from qartsr_pipeline.image.metrics import psnr_y

DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss}
Perceptual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def autoencoder_loss(model: Teacher, up: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """L1 of reconstructing three quarters photographs, one quarter inputs, plus a faint pull to a standard normal posterior."""
    photographs = high.shape[0] * 3 // 4
    x = torch.cat([high[:photographs], up[photographs:]])
    posterior = model.vae.encode(x).latent_dist
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return F.l1_loss(model.vae.decode(posterior.sample()).sample.float(), x) + 1e-5 * kl.float()


def loss_of(
    phase: str,
    model: Teacher,
    up: torch.Tensor,
    high: torch.Tensor,
    train_encoder: bool,
    distance: str = "l1",
    perceptual: Perceptual | None = None,
) -> torch.Tensor:
    """The loss of one batch, a scalar.

    Args:
        phase: one of `training_settings.PHASES`.
        up, high: input and target, (B, 3, P, P) in [-1, 1].
        distance: one of `DISTANCES`, between latents in the phase "latent" and between pictures in "pixel" and "joint".
        perceptual: (picture, target) -> scalar, added to the distance between pictures as it is.
    """
    distance_of = DISTANCES[distance]
    if phase == "autoencoder":
        return autoencoder_loss(model, up, high)
    if phase == "latent":
        with torch.no_grad():
            source, target = model.encode(up), model.encode(high).float()
        return distance_of(model.step(source).float(), target)
    with torch.set_grad_enabled(train_encoder or phase == "joint"):
        source = model.encode(up)
    picture = model.decode(model.step(source)).float()
    loss = distance_of(picture, high)
    if perceptual is not None:
        loss = loss + perceptual(picture, high)
    if phase == "joint":
        half = max(1, high.shape[0] // 2)  # keeps the autoencoder good, and an identity for the input: the UNet goes on restoring
        loss = loss + autoencoder_loss(model, up[:half], high[:half])
    return loss


def trained_modules(phase: str, model: Teacher, train_encoder: bool) -> list[torch.nn.Module]:
    """What a phase trains; everything else is frozen."""
    if phase == "autoencoder":
        return [model.vae]
    if phase == "joint":
        return [model.vae, model.unet]
    encoder = [model.vae.encoder, model.vae.quant_conv] if train_encoder and phase == "pixel" else []
    return [model.unet, *encoder]


@torch.no_grad()
def validate(model: Teacher, pairs: list[Pair]) -> dict[str, float]:
    """Mean PSNR-Y in dB over held-out patches, without colour alignment.

    "model" is the model's; "bypass" leaves its UNet out (z_H = z_L); "autoencoder" reproduces the target; "bicubic" is the
    input's.
    """
    device = model.scaling_factor.device
    rows = []
    for up, high in pairs:
        z = model.encode(up.to(device))
        results = {
            "bicubic": up,
            "model": model.decode(model.step(z)),
            "bypass": model.decode(z),
            "autoencoder": model.decode(model.encode(high.to(device))),
        }
        rows.append({name: picture_quality(result, high) for name, result in results.items()})
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def picture_quality(picture: torch.Tensor, target: torch.Tensor) -> float:
    """PSNR-Y in dB of (B, 3, H, W), both in [-1, 1] and clamped to it."""
    return psnr_y(_unit(picture), _unit(target))


def _unit(picture: torch.Tensor) -> torch.Tensor:
    return (picture.float().clamp(-1, 1) + 1) / 2


def set_scaling_factor(model: Teacher, patches: Patches) -> None:
    """Makes the latents of training pictures unit variance, as Stable Diffusion's 0.18215 does."""
    with torch.no_grad():
        _, high = sample_pair(patches, 32, 128, np.random.default_rng(0))
        model.scaling_factor.fill_(1 / float(model.vae.encode(high.to(model.scaling_factor.device)).latent_dist.mode().std()))
