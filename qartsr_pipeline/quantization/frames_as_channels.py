"""The causal convolutions of WAN's autoencoder as two-dimensional ones over frames that lie side by side in channels.

A k x k x k convolution over time, height and width sums over k frames. With these as k C channels of one map it is a k x k
convolution, which has a quantized form like any other. Exact; the input is copied k times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import nn

from qartsr_pipeline.quantization.scheme import replace_module


class ConvolutionOverFrames(nn.Module):
    """What a `WanCausalConv3d` computes.

    Submodule `conv`: takes (B, taps C, H, W); channel number t C + c is channel c of frame t, the earliest frame first.

    Attributes:
        taps, stride: along time.
        before: frames of zeros before the first one.
    """

    def __init__(self, convolution: WanCausalConv3d):
        super().__init__()
        weight = convolution.weight
        outputs, inputs, self.taps, height, width = weight.shape
        self.stride, *stride = convolution.stride
        right, _, bottom, _, self.before, _ = map(int, convolution._padding)
        with torch.device("meta"):
            self.conv = nn.Conv2d(
                self.taps * inputs,
                outputs,
                (height, width),
                (stride[0], stride[1]),
                (bottom, right),
                bias=convolution.bias is not None,
            )
        flat = weight.detach().transpose(1, 2).reshape(outputs, -1, height, width)
        self.conv.weight = nn.Parameter(flat, requires_grad=weight.requires_grad)
        self.conv.bias = convolution.bias

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, N, T', H', W'); ``cache_x`` (B, C, t, H, W) are the frames before, if there were any."""
        before = self.before
        if cache_x is not None and before > 0:
            x, before = torch.cat([cache_x.to(x.device), x], 2), before - cache_x.shape[2]
        if before:
            x = F.pad(x, (0, 0, 0, 0, before, 0))
        windows = x.permute(0, 2, 3, 4, 1).unfold(1, self.taps, self.stride)  # (B, T', H, W, C, taps)
        batch, frames, height, width = windows.shape[:4]
        maps = windows.transpose(4, 5).reshape(batch * frames, height, width, -1).permute(0, 3, 1, 2)  # channels-last
        return self.conv(maps).unflatten(0, (batch, frames)).transpose(1, 2)


def frames_as_channels(vae: AutoencoderKLWan) -> None:
    """Exchanges every causal convolution, in place. Its weight's values stay, in another order; on meta, too."""
    for name, module in list(vae.named_modules()):
        if type(module) is WanCausalConv3d:
            replace_module(vae, name, ConvolutionOverFrames(module))
