"""Causal convolutions as two-dimensional ones: the same numbers, whole and in parts."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

from qartsr_pipeline.quantization.frames_as_channels import ConvolutionOverFrames, frames_as_channels
from tiny_models import build_tiny_video_pipeline, build_tiny_video_vae

KINDS = {
    "3 x 3 x 3": {"kernel_size": 3, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "doubling frames": {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)},
    "halving frames": {"kernel_size": (3, 1, 1), "stride": (2, 1, 1)},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_numbers(kind):
    torch.manual_seed(0)
    convolution = WanCausalConv3d(5, 7, **KINDS[kind])
    other, x = ConvolutionOverFrames(convolution), torch.randn(2, 5, 5, 6, 4)
    assert torch.allclose(other(x), convolution(x), atol=1e-5)
    for cached in (1, 2):
        cache = torch.randn(2, 5, cached, 6, 4)
        assert torch.allclose(other(x, cache), convolution(x, cache), atol=1e-5)


@pytest.mark.parametrize("temporal", [False, True])
@torch.no_grad()
def test_the_autoencoder_stays_what_it_is(temporal):
    vae, x = build_tiny_video_vae(temporal), torch.rand(1, 3, 5, 16, 24) * 2 - 1
    latents = vae.encode(x).latent_dist.mode()
    frames = vae.decode(latents).sample
    count = sum(p.numel() for p in vae.parameters())
    frames_as_channels(vae)
    assert not any(isinstance(module, WanCausalConv3d) for module in vae.modules())
    assert sum(p.numel() for p in vae.parameters()) == count
    assert torch.allclose(vae.encode(x).latent_dist.mode(), latents, atol=1e-5)
    assert torch.allclose(vae.decode(latents).sample, frames, atol=1e-5)


@torch.no_grad()
def test_streamed_in_the_pipeline():
    pipeline, video = build_tiny_video_pipeline(temporal=True), torch.rand(9, 3, 16, 16)
    expected = pipeline(video, output_type="pt").frames
    frames_as_channels(pipeline.vae)
    assert torch.allclose(pipeline(video, output_type="pt").frames, expected, atol=1e-4)
