"""The network on tensors: encode, one UNet call, decode. For engineers; users call the pipeline.

z_L = vae.encode(x) * scaling_factor
z_H = (z_L - sqrt(1 - abar_T) eps(z_L; T, c)) / sqrt(abar_T)
y   = vae.decode(z_H / scaling_factor)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from qartsr_pipeline.overflow import run_finite


@dataclass
class OneStepNetwork:
    """The three stages of one-step super-resolution. Every stage takes and returns tensors on `device`.

    Attributes:
        prompt_embeds: (1, tokens, dim).
        timestep: T.
        alpha_bar: abar_T, `scheduler.alphas_cumprod[T]`.
        wide_stages: stages that overflowed in 16 bits, and the dtype they run in from then on.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    prompt_embeds: torch.Tensor
    timestep: int
    alpha_bar: float
    device: torch.device
    wide_stages: dict[str, torch.dtype] = field(default_factory=dict)

    def encode(self, x: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> z_L (B, C, H/f, W/f): the posterior's mode, or a draw made with standard
        normal `noise` of z_L's shape."""

        def stage(x: torch.Tensor) -> torch.Tensor:
            posterior = self.vae.encode(x).latent_dist
            latents = posterior.mode() if noise is None else posterior.mean + posterior.std * noise.to(posterior.mean)
            return latents * self.vae.config.scaling_factor

        return run_finite("encode", stage, self.vae, x.to(self.device), self.wide_stages)

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """z_L -> z_H, same shape (OSEDiff's equation)."""

        def stage(z: torch.Tensor) -> torch.Tensor:
            prompt = self.prompt_embeds.to(z).expand(z.shape[0], -1, -1)  # (B, tokens, dim)
            eps = self.unet(z, self.timestep, encoder_hidden_states=prompt, return_dict=False)[0]
            return (z - math.sqrt(1 - self.alpha_bar) * eps) / math.sqrt(self.alpha_bar)

        return run_finite("unet", stage, self.unet, latents, self.wide_stages)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """z_H -> (B, 3, H, W), about [-1, 1]."""

        def stage(z: torch.Tensor) -> torch.Tensor:
            return self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False)[0]

        return run_finite("decode", stage, self.vae, latents, self.wide_stages)
