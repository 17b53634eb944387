"""Exchange of whole blocks of deployed models for ones that pass over their feature maps fewer times.

`fuse` is for inference on deployed models, and done to every model that is loaded. Names, tensors and results stay as they were,
up to the rounding of the float type: where that moves a value across a tie, its code is the next one.

A GroupNorm and the SiLU behind it become part of the pass in which the convolution quantizes its input, if the backend has such
a pass: Triton's, with QARTSR_BACKEND=triton. On a CPU, made of torch's operators block by block in the cache, it was no faster
than one after the other (tiny W4A4, 128 to 512 pixels, one thread: 3.94 s and 3.87 s): half of its time is SiLU's exponential,
and calls for every block cost what they save. Norm and convolution are called as modules, one after the other, where anything
else would skip what somebody has put around them: hooks, offloading, another forward. Only statistics that tiles share
(`tiled_normalization.FixedNorm`) say themselves what they multiply and add. Such a backend adds the block's input, too, in its
product's epilogue.

An attention's queries, keys and values are made of one input, which is quantized once, in every backend but the reference, unless
gradients are wanted or torch.compile computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.kernels import normalizing_backend, quantize_alike
from qartsr_pipeline.quantization.deployed import DeployedConv2d, DeployedLayer
from qartsr_pipeline.quantization.scheme import replace_module
from qartsr_pipeline.quantization.surroundings import has_hooks, other_forward

if TYPE_CHECKING:  # diffusers imports this package while it is itself being imported (see `registration`)
    from diffusers.models.resnet import ResnetBlock2D


def convolution_of_normalized(
    x: torch.Tensor, norm: nn.GroupNorm, convolution: DeployedLayer, residual: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """``convolution(silu(norm(x)))``, plus ``residual()`` if there is one, in fewer passes where that can be."""
    arguments = _normalizing_pass(x, norm, convolution)
    if arguments is not None:
        backend, scale, shift = arguments
        return backend.norm_conv2d(x, scale, shift, convolution, silu=True, residual=residual and residual())
    y = convolution(F.silu(norm(x), inplace=_may_be_overwritten(norm)))
    if residual is None:
        return y
    return y.add_(residual()) if _may_be_overwritten(convolution) else y + residual()


def _normalizing_pass(
    x: torch.Tensor, norm: nn.GroupNorm, convolution: DeployedLayer
) -> tuple[ModuleType, torch.Tensor, torch.Tensor] | None:
    """Backend, factors and summands of such a pass; None where norm and convolution must be called one after the other."""
    if torch.compiler.is_compiling():
        return None
    fixed = other_forward(norm)
    if type(convolution) is not DeployedConv2d or other_forward(convolution) or has_hooks(norm) or has_hooks(convolution):
        return None
    backend = normalizing_backend(x, convolution)
    if backend is None or (fixed and not hasattr(fixed, "scale_shift")):
        return None
    return backend, *(fixed.scale_shift(x) if fixed else backend.group_scale_shift(x, norm))


def _may_be_overwritten(module: nn.Module) -> bool:
    """Whether nobody may have kept the module's output: a hook, or the graph of gradients. A compiler sees that itself."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or has_hooks(module) or other_forward(module))


class LeanResnetBlock(nn.Module):
    """diffusers' ResNet block with `convolution_of_normalized`, time shift and residual sum in place, and no division by 1.

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
        hidden = convolution_of_normalized(input_tensor, self.norm1, self.conv1)
        if self.time_emb_proj is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
            hidden = hidden.add_(shift) if _may_be_overwritten(self.conv1) else hidden + shift
        hidden = convolution_of_normalized(hidden, self.norm2, self.conv2, lambda: self._straight(input_tensor))
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor

    def _straight(self, input_tensor: torch.Tensor) -> torch.Tensor:
        return input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)


def is_fusable(block: nn.Module) -> bool:
    """Whether `LeanResnetBlock` computes what this does: a deployed ResNet block, SiLU, no resampling, a plain time shift."""
    from diffusers.models.resnet import ResnetBlock2D

    return (
        type(block) is ResnetBlock2D
        and not (has_hooks(block) or other_forward(block))
        and isinstance(block.conv1, DeployedLayer)
        and isinstance(block.conv2, DeployedLayer)
        and type(block.nonlinearity) is nn.SiLU
        and all(type(norm) is nn.GroupNorm and norm.affine for norm in (block.norm1, block.norm2))
        and block.upsample is None
        and block.downsample is None
        and (block.time_embedding_norm == "default" or block.time_emb_proj is None)  # "group" in a VAE's decoder
    )


def is_shareable(attention: nn.Module) -> bool:
    """Whether this is diffusers' attention, with queries, keys and values of one quantized input."""
    from diffusers.models.attention_processor import Attention

    from qartsr_pipeline.quantization.shared_attention import projections

    return (
        type(attention) is Attention
        and not (has_hooks(attention) or other_forward(attention))
        and all(isinstance(layer, DeployedLayer) for layer in projections(attention))
        and quantize_alike(projections(attention), attention.to_q.smooth.device)
    )


def fuse(model: nn.Module) -> int:
    """Exchanges blocks in place; doing it twice changes nothing.

    Returns:
        How many were exchanged.
    """
    from qartsr_pipeline.quantization.shared_attention import SharedInputAttention

    names = [name for name, block in model.named_modules() if is_fusable(block)]
    for name in names:
        replace_module(model, name, LeanResnetBlock(model.get_submodule(name)))
    attentions = [module for module in model.modules() if is_shareable(module)]
    for attention in attentions:
        vars(attention).pop("forward", None)  # the class's own, where accelerate has left it
        attention.__class__ = SharedInputAttention
    return len(names) + len(attentions)
