"""The causal convolutions of WAN's autoencoder as two-dimensional ones over frames that lie side by side in channels.

A k x k x k convolution over time, height and width sums over k frames. With these as k C channels of one map it is a k x k
convolution, which has a quantized form like any other. Exact; the input is copied k times, but where `LeanVideoBlock` has its
norm and convolution in one pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import CACHE_T, WanCausalConv3d, WanResidualBlock, WanRMS_norm
from torch import nn

from qartsr_pipeline.forwards import has_hooks, other_forward
from qartsr_pipeline.kernels.frames import can_run_frames, normalized_frames_conv2d
from qartsr_pipeline.quantization.deployed import DeployedConv2d
from qartsr_pipeline.quantization.scheme import replace_module

Cache = list[torch.Tensor | str | None]


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


class LeanVideoBlock(nn.Module):
    """diffusers' residual block of the autoencoder, for deployed convolutions: norm, SiLU, quantize step and the copies for the
    convolution are one pass where there is one (`kernels.frames`), and the sum is in place.

    Holds the very modules of the block that it replaces, under the same names.
    """

    norm1: nn.Module
    conv1: nn.Module
    norm2: nn.Module
    conv2: nn.Module
    conv_shortcut: nn.Module

    def __init__(self, block: WanResidualBlock):
        super().__init__()
        for name in ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"):
            setattr(self, name, getattr(block, name))
        self.train(block.training)

    def forward(self, x: torch.Tensor, feat_cache: Cache | None = None, feat_idx: list[int] | None = None) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, N, T, H, W). The caches are as in diffusers' block: the last two normalized frames."""
        straight = self.conv_shortcut(x)
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            before = None
            if feat_cache is not None and feat_idx is not None:
                before = feat_cache[feat_idx[0]]
            x, last = convolution_of_normalized_frames(x, norm, convolution, before)
            if feat_cache is not None and feat_idx is not None:
                feat_cache[feat_idx[0]] = last
                feat_idx[0] += 1
        return x + straight


def convolution_of_normalized_frames(
    x: torch.Tensor, norm: nn.Module, convolution: nn.Module, before: torch.Tensor | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``convolution(silu(norm(x)), before)``, and the last two frames of its input, those of ``before`` counted."""
    assert not isinstance(before, str)  # a mark that only resampling layers leave
    if (
        isinstance(convolution, ConvolutionOverFrames)
        and isinstance(convolution.conv, DeployedConv2d)
        and (convolution.stride, convolution.before) == (1, convolution.taps - 1)
        and type(norm) is WanRMS_norm
        and isinstance(norm.bias, float)
        and not any(has_hooks(module) or other_forward(module) for module in (norm, convolution, convolution.conv))
        and can_run_frames(x, convolution.conv)
    ):
        weight = norm.gamma.flatten().float() * norm.scale
        y, last = normalized_frames_conv2d(x, before, weight, convolution.conv, min(CACHE_T, x.shape[2]))
    else:
        x = F.silu(norm(x))
        y, last = convolution(x, before), x[:, :, -CACHE_T:].clone()
    if before is not None and last.shape[2] < CACHE_T:
        last = torch.cat([before[:, :, -1:].to(last.device), last], 2)
    return y, last


def is_fusable(block: nn.Module) -> bool:
    """Whether `LeanVideoBlock` computes what this does: both convolutions deployed, SiLU, no dropout."""
    return (
        type(block) is WanResidualBlock
        and not (has_hooks(block) or other_forward(block))
        and all(
            isinstance(convolution, ConvolutionOverFrames) and isinstance(convolution.conv, DeployedConv2d)
            for convolution in (block.conv1, block.conv2)
        )
        and type(block.nonlinearity) is nn.SiLU
        and block.dropout.p == 0
    )
