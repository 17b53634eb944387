"""The small full-precision model: which stock diffusers classes, how wide, and how it is initialised: nearly linear, with
normalization that starts as a constant scaling.

GroupNorm removes the tone and contrast of its input. Super-resolution must keep them, and a tile must come out like the same
place of the whole image. So two channels of every normalized tensor are "anchors": constants +A and -A that no later layer
reads and that dominate the statistics, which makes the normalization nearly the same for any patch. Its affine weight undoes the
scale. The layers stay stock layers; only their initial values, and gradients masked at the anchors, are special.

Measured on the autoencoder alone (300 steps, 64-pixel patches): 25.9 dB with one plain normalization group, 27.9 dB with eight,
30.2 dB with normalization removed, 29.9 dB with anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel

TIMESTEP = 250  # the default T
Parts = tuple[AutoencoderKL, UNet2DConditionModel, DDPMScheduler, torch.Tensor]
ANCHORED = ("conv_in", "conv1", "conv_shortcut", "conv")  # last names of the convolutions that begin a normalized tensor
ADDED = ("conv2", "proj_out")  # those added onto one
STRENGTH = 6.0  # standard deviation that the anchors alone give the normalized tensor; signals have about 1


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


def _mask_gradient(parameter: torch.Tensor, mask: torch.Tensor) -> None:
    parameter.data.mul_(mask)
    parameter.register_hook(lambda gradient: gradient * mask.to(gradient.device))  # the model may have moved since


def _start_writers(model: nn.Module) -> None:
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if not isinstance(module, nn.Conv2d):
            continue
        nn.init.orthogonal_(module.weight)
        assert module.bias is not None  # diffusers' convolutions have one
        nn.init.zeros_(module.bias)
        if last in ADDED:
            nn.init.zeros_(module.weight)  # residual branches start at nothing
        if last in ANCHORED + ADDED:
            mask = torch.ones_like(module.weight)
            mask[:2] = 0
            _mask_gradient(module.weight, mask)
        if last in ANCHORED:
            with torch.no_grad():
                amplitude = STRENGTH * math.sqrt(module.out_channels / 2)
                module.bias[:2] = torch.tensor([amplitude, -amplitude])


def _ignore_constants(module: nn.Conv2d | nn.GroupNorm, inputs: tuple[torch.Tensor, ...]) -> None:
    x = inputs[0].detach()
    constant = x.flatten(2).std(-1).amax(0) < 1e-6
    with torch.no_grad():
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(STRENGTH)
            mask = (~constant).float()
            _mask_gradient(module.weight, mask)
            _mask_gradient(module.bias, mask)
        elif module.in_channels > 3:
            mask = torch.ones_like(module.weight)
            mask[:, constant] = 0
            _mask_gradient(module.weight, mask)


def start_near_linear(model: nn.Module, forward: Callable[[], object]) -> None:
    """Initialises ``model`` (an encoder, decoder or UNet of diffusers) in place.

    Args:
        forward: runs the model once on any input that is not constant: each layer then learns which channels are anchors.
    """
    _start_writers(model)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.GroupNorm))]
    handles = [m.register_forward_pre_hook(_ignore_constants) for m in layers]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
