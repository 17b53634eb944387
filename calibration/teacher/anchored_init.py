"""How the small model is initialised: nearly linear, with normalization that starts as a constant scaling.

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
from torch import nn

ANCHORED = ("conv_in", "conv1", "conv_shortcut", "conv")  # last names of the convolutions that begin a normalized tensor
ADDED = ("conv2", "proj_out")  # those added onto one
STRENGTH = 6.0  # standard deviation that the anchors alone give the normalized tensor; signals have about 1


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
