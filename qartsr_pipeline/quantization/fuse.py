"""Exchange of whole blocks of deployed models for ones that pass over their feature maps fewer times.

`fuse` is for inference on deployed models. Names, tensors and results stay as they were, up to the rounding of the float type;
group norms are still called as modules, so that tiles can share their statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.scheme import replace_module

if TYPE_CHECKING:  # diffusers imports this package while it is itself being imported (see `registration`)
    from diffusers.models.resnet import ResnetBlock2D


class LeanResnetBlock(nn.Module):
    """diffusers' ResNet block with SiLU, time shift and residual sum in place, and no division by 1.

    Holds the very modules of the block that it replaces, under the same names.
    """

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"):
            setattr(self, name, getattr(block, name))
        self.skip_time_act, self.output_scale_factor = block.skip_time_act, block.output_scale_factor
        self.train(block.training)

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W), and the time embedding (B, D) or None -> (B, N, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))
        if self.time_emb_proj is not None:
            hidden = hidden.add_(self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None])
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=True))
        hidden = hidden.add_(input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor))
        return hidden if self.output_scale_factor == 1 else hidden.div_(self.output_scale_factor)


def is_fusable(block: nn.Module) -> bool:
    """Whether `LeanResnetBlock` computes what this does: a deployed ResNet block, SiLU, no resampling, a plain time shift."""
    from diffusers.models.resnet import ResnetBlock2D

    return (
        type(block) is ResnetBlock2D
        and isinstance(block.conv1, DeployedLayer)
        and isinstance(block.conv2, DeployedLayer)
        and type(block.nonlinearity) is nn.SiLU
        and block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
    )


def fuse(model: nn.Module) -> int:
    """Exchanges blocks in place; doing it twice changes nothing.

    Returns:
        How many were exchanged.
    """
    names = [name for name, block in model.named_modules() if is_fusable(block)]
    for name in names:
        replace_module(model, name, LeanResnetBlock(model.get_submodule(name)))
    return len(names)
