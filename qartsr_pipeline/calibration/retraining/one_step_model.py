"""The small full-precision model: which stock diffusers classes, how wide, and the one step as it is trained."""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from calibration.teacher.anchored_init import start_near_linear

TIMESTEP = 250  # the default T
SCALE = 4  # enlargement
Models = tuple[AutoencoderKL, UNet2DConditionModel, DDPMScheduler, torch.Tensor]


def build_models(seed: int) -> Models:
    """Fresh models and the fixed prompt embedding, shape (1, 8, 64), standard normal."""
    torch.manual_seed(seed)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    prompt = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(seed))
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=24,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=512,
    )
    unet = UNet2DConditionModel(
        sample_size=128,
        in_channels=24,
        out_channels=24,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 64, 96),
        layers_per_block=2,
        norm_num_groups=1,
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    picture, latent = torch.randn(1, 3, 64, 64), torch.randn(1, 24, 16, 16)
    start_near_linear(vae.encoder, lambda: vae.encoder(picture))
    start_near_linear(vae.decoder, lambda: vae.decoder(latent))
    start_near_linear(unet, lambda: unet(latent, 0, encoder_hidden_states=prompt))
    with torch.no_grad():  # a posterior as wide as the latent would drown the picture for the first thousand steps
        vae.quant_conv.bias[vae.config.latent_channels :] = -8
    torch.nn.init.zeros_(unet.conv_out.weight)
    return vae, unet, scheduler, prompt


class Teacher(torch.nn.Module):
    """The one-step model as trained: latents are scaled, pictures are in [-1, 1].

    Args:
        seed: of fresh weights.
        timestep: T.
        models: what `build_models` returns, in its place.
    """

    def __init__(self, seed: int, timestep: int, models: Models | None = None):
        super().__init__()
        self.vae, self.unet, self.scheduler, prompt = models or build_models(seed)
        self.register_buffer("prompt_embeds", prompt)
        self.register_buffer("scaling_factor", torch.ones(()))
        self.timestep = timestep
        self.alpha_bar = float(self.scheduler.alphas_cumprod[timestep])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.vae.encode(x).latent_dist.mode() * self.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.vae.decode(z / self.scaling_factor).sample

    def step(self, z: torch.Tensor) -> torch.Tensor:
        """z_H = (z_L - sqrt(1 - abar) eps) / sqrt(abar), OSEDiff eq. 4."""
        prompt = self.prompt_embeds.expand(z.shape[0], -1, -1)
        eps = self.unet(z, self.timestep, encoder_hidden_states=prompt).sample
        return (z - math.sqrt(1 - self.alpha_bar) * eps) / math.sqrt(self.alpha_bar)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.step(self.encode(x)))
