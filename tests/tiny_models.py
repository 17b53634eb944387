"""A random pipeline that is small enough for a test: real diffusers classes, a few thousand weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding


def build_tiny_vae() -> AutoencoderKL:
    """Two levels, so the latent has half the image's size; 4 latent channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=64,
        scaling_factor=0.5,
    ).eval()


def build_tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=1,
        cross_attention_dim=16,
        attention_head_dim=8,
    ).eval()


def build_tiny_pipeline(seed: int = 0, timestep: int = 250) -> QArtSRPipeline:
    """The same weights for the same seed, whatever the state of torch's generators, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae, unet = build_tiny_vae(), build_tiny_unet()
        prompt = PromptEmbedding.from_tensor(torch.randn(1, 4, 16))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipeline = QArtSRPipeline(unet=unet, vae=vae, scheduler=scheduler, prompt_embedding=prompt, timestep=timestep, scale=4)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
