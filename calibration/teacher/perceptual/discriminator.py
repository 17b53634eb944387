"""Tells photographs from the model's images: what pulls texture out of a model that pixel losses make smooth.

Both give a verdict for each place that they see, not for the image. Spectral normalization (arXiv 1802.05957) bounds their
slope, so that a small weight of the adversarial term stays small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.2  # of LeakyReLU


class PatchDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> verdicts (B, 1, H / 8, W / 8), the higher the more like a photograph; sees about 80 pixels.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 32, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            widths = (3, width, 2 * width, 4 * width)
            layers = [nn.Conv2d(widths[i], widths[i + 1], 4, 2, 1) for i in range(3)]
            layers.append(nn.Conv2d(widths[3], widths[3], 3, 1, 1))
            self.layers = nn.ModuleList(spectral_norm(layer) for layer in layers)
            self.last = nn.Conv2d(widths[3], 1, 3, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            image = F.leaky_relu(layer(image), SLOPE)
        return self.last(image)


class UNetDiscriminator(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> a verdict for every pixel, (B, 1, H, W), as Real-ESRGAN's: it also says where.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 24, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, width, 3, 1, 1)
            pairs = [(width, 2 * width), (2 * width, 4 * width), (4 * width, 4 * width)]
            self.down = nn.ModuleList(spectral_norm(nn.Conv2d(a, b, 4, 2, 1, bias=False)) for a, b in pairs)
            self.up = nn.ModuleList(spectral_norm(nn.Conv2d(b, a, 3, 1, 1, bias=False)) for a, b in reversed(pairs))
            self.last = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = F.leaky_relu(self.first(image), SLOPE)
        seen = []
        for layer in self.down:
            seen.append(x)
            x = F.leaky_relu(layer(x), SLOPE)
        for layer in self.up:
            skip = seen.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.leaky_relu(layer(x), SLOPE) + skip
        return self.last(x)


DISCRIMINATORS = {"patch": PatchDiscriminator, "unet": UNetDiscriminator}


def generator_loss(verdicts: torch.Tensor) -> torch.Tensor:
    """How surely the model's images were recognised, a scalar above 0; log 2 where the discriminator cannot tell."""
    return F.softplus(-verdicts.float()).mean()


def discriminator_loss(photographs: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """The mean of both kinds' cross-entropy, a scalar above 0; log 2 where it cannot tell, 0 where it always can."""
    return (F.softplus(-photographs.float()).mean() + F.softplus(made.float()).mean()) / 2
