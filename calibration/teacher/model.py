"""The small full-precision model: which stock diffusers classes, how wide, and how it is initialised."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from calibration.teacher.anchored_init import start_near_linear
from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel

TIMESTEP = 250  # the default T
Parts = tuple[AutoencoderKL, UNet2DConditionModel, DDPMScheduler, torch.Tensor]


def new_model(seed: int, timestep: int) -> OneStepModel:
    """A model with fresh weights, the same for the same seed."""
    return OneStepModel(*build_models(seed), timestep)


def build_models(seed: int) -> Parts:
    """VAE, UNet, scheduler and the fixed prompt embedding, (1, 8, 64), standard normal."""
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
    image, latent = torch.randn(1, 3, 64, 64), torch.randn(1, 24, 16, 16)
    start_near_linear(vae.encoder, lambda: vae.encoder(image))
    start_near_linear(vae.decoder, lambda: vae.decoder(latent))
    start_near_linear(unet, lambda: unet(latent, 0, encoder_hidden_states=prompt))
    with torch.no_grad():  # a posterior as wide as the latent would drown the image for the first thousand steps
        vae.quant_conv.bias[vae.config.latent_channels :] = -8
    torch.nn.init.zeros_(unet.conv_out.weight)
    return vae, unet, scheduler, prompt
