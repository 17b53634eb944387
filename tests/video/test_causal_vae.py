"""The autoencoder, streamed, gives what diffusers' own encode and decode give for the whole clip."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan

from qartsr_pipeline.overflow import OverflowMemory
from qartsr_pipeline.video.causal_vae import (
    IdleAttention,
    skip_idle_attention,
    spatial_factor,
    streamed_decoder,
    streamed_encoder,
    temporal_factor,
)
from tiny_models import build_tiny_video_vae

CPU = torch.device("cpu")


def normalised(vae, latents):
    mean, deviation = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return (latents - mean) / deviation


@torch.no_grad()
@pytest.mark.parametrize("groups", [(9,), (1, 4, 4), (2, 3, 1, 1, 2), (1,) * 9])
def test_any_grouping_equals_the_whole_clip(groups):
    vae = build_tiny_video_vae()
    x = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    encode, decode = streamed_encoder(vae, CPU, OverflowMemory()), streamed_decoder(vae, CPU, OverflowMemory())
    latents = torch.cat([encode(part) for part in x.split(groups, dim=2)], dim=2)
    own = vae.encode(x).latent_dist.mode()
    assert torch.allclose(latents, normalised(vae, own), atol=1e-5)
    frames = torch.cat([decode(part) for part in latents.split(groups, dim=2)], dim=2)
    assert torch.allclose(frames.clamp(-1, 1), vae.decode(own).sample, atol=1e-5)


@torch.no_grad()
def test_with_wans_temporal_downsampling():
    """Four frames to a latent, the first alone, as diffusers groups them."""
    sizes = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1], "num_res_blocks": 1}
    vae = AutoencoderKLWan(**sizes, temperal_downsample=[True, True])
    assert temporal_factor(vae) == 4 and spatial_factor(vae) == 4
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    encode, decode = streamed_encoder(vae, CPU, OverflowMemory()), streamed_decoder(vae, CPU, OverflowMemory())
    latents = torch.cat([encode(part) for part in x.split((1, 4, 4), dim=2)], dim=2)
    own = vae.encode(x).latent_dist.mode()
    assert latents.shape[2] == 3 and torch.allclose(latents, normalised(vae, own), atol=1e-5)
    frames = torch.cat([decode(part) for part in latents.split(1, dim=2)], dim=2)
    assert frames.shape == x.shape and torch.allclose(frames.clamp(-1, 1), vae.decode(own).sample, atol=1e-5)


@torch.no_grad()
def test_attention_is_left_out_only_while_it_adds_nothing():
    vae = build_tiny_video_vae()
    skip_idle_attention(vae)
    blocks = [module for module in vae.modules() if isinstance(module, IdleAttention)]
    assert len(blocks) == 2
    x = torch.rand(1, 16, 2, 4, 4)
    assert not torch.equal(blocks[0](x), x)  # random weights
    before = copy.deepcopy(blocks[0])
    for parameter in before.proj.parameters():
        parameter.zero_()
    assert before(x) is x
    before.proj.bias.fill_(1)
    assert torch.allclose(before(x), x + 1)
