"""A random pipeline that is small enough for a test: real diffusers classes, a few thousand weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
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


def build_tiny_video_vae(temporal: bool = False) -> AutoencoderKLWan:
    """Two levels, so latents have half the frame's sides; 4 latent channels; ``temporal``: half the frames, too."""
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[temporal],
        latents_mean=[0.1, -0.2, 0.0, 0.3],
        latents_std=[0.5, 1.0, 0.8, 1.2],
    ).eval()


def build_tiny_video_pipeline(seed: int = 0, temporal: bool = False) -> LSGQuantVideoPipeline:
    """As `build_tiny_pipeline`; tiles of 64 pixels, chunks of 5 frames."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = build_tiny_video_vae(temporal)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=64,
            num_layers=2,
        ).eval()
        prompt = PromptEmbedding.from_tensor(torch.randn(1, 4, 16))
    parts = {"transformer": transformer, "vae": vae, "prompt_embedding": prompt}
    pipeline = LSGQuantVideoPipeline(
        **parts, scheduler=FlowMatchEulerDiscreteScheduler(), timestep=400, scale=4, tile_size=64, frames_per_chunk=5
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
