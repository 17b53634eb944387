"""Exchange of whole ResNet blocks of deployed models for ones that pass over their feature maps fewer times, and of how their
attention is computed.

`fuse` is for inference on deployed models, and done to every model that is loaded. Names, tensors and results stay as they were,
up to the rounding of the float type: where that moves a value across a tie, its code is the next one.

A GroupNorm and the SiLU behind it become part of the pass in which the convolution quantizes its input, if the backend has such
a pass: those for CPUs where numba is installed, and Triton's, with QARTSR_BACKEND=triton. (Made of torch's operators, block by
block in a CPU's cache, it was no faster than one after the other.) Norm and convolution are called as modules, one after the
other, where anything else would skip what was put around them: hooks, offloading, another forward. Only statistics that tiles
share (`image.tile_statistics.FixedNorm`) are asked what they multiply and add. Triton also adds the block's input in its
product's epilogue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import nn

from qartsr_pipeline.forwards import has_hooks, other_forward
from qartsr_pipeline.kernels import NormFusion, norm_fusion, note_input
from qartsr_pipeline.kernels.cpu import dtype_on_cpu
from qartsr_pipeline.quantization import frames_as_channels
from qartsr_pipeline.quantization.deployed import DeployedConv2d, DeployedLayer
from qartsr_pipeline.quantization.scheme import replace_module


@runtime_checkable
class AffineForward(Protocol):
    """The forward of a norm that is a fixed factor and summand for each channel."""

    def scale_shift(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What x (B, C, ...) is multiplied by, and what is then added: float32 (B, C), twice, contiguous."""


def convolution_of_normalized(
    x: torch.Tensor, norm: nn.GroupNorm, convolution: nn.Module, residual: Callable[[], torch.Tensor] | None = None
) -> torch.Tensor:
    """``convolution(silu(norm(x)))``, plus ``residual()`` if there is one, in fewer passes where that can be."""
    if isinstance(convolution, DeployedConv2d):
        fused = _normalizing_pass(x, norm, convolution)
        if fused is not None:
            fusion, scale, shift = fused
            added = None if residual is None else residual()
            return fusion.norm_conv2d(x, scale, shift, convolution, silu=True, residual=added)
    y = convolution(F.silu(norm(x), inplace=_may_be_overwritten(norm)))
    if residual is None:
        return y
    return y.add_(residual()) if _may_be_overwritten(convolution) else y + residual()


def _normalizing_pass(
    x: torch.Tensor, norm: nn.GroupNorm, convolution: DeployedConv2d
) -> tuple[NormFusion, torch.Tensor, torch.Tensor] | None:
    """A pass that does both, its factors and its summands; None where norm and convolution must be called one after the other."""
    if torch.compiler.is_compiling() or other_forward(convolution) or has_hooks(norm) or has_hooks(convolution):
        return None
    fusion, fixed = norm_fusion(x, convolution), other_forward(norm)
    if fusion is None:
        return None
    if fixed is None:
        scale, shift = fusion.group_scale_shift(x, norm)
        watched = (shift,)  # is not finite if anything in x is not
    elif isinstance(fixed, AffineForward):
        scale, shift = fixed.scale_shift(x)
        watched = (x, scale, shift)
    else:
        return None
    if convolution.spec.hides_what_is_not_finite:
        for tensor in watched:
            note_input(tensor)
    return fusion, scale, shift


def _may_be_overwritten(module: nn.Module) -> bool:
    """Whether nothing else can have kept the module's output: no hook, no graph of gradients. A compiler sees that itself."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or has_hooks(module) or other_forward(module))


class LeanResnetBlock(nn.Module):
    """diffusers' ResNet block with `convolution_of_normalized`, time shift and residual sum in place, and no division by 1.

    Holds the very modules of the block that it replaces, under the same names.
    """

    norm1: nn.GroupNorm
    conv1: nn.Module
    time_emb_proj: nn.Module | None
    norm2: nn.GroupNorm
    conv2: nn.Module
    conv_shortcut: nn.Module | None

    def __init__(self, block: ResnetBlock2D):
        super().__init__()
        for name in ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"):
            setattr(self, name, getattr(block, name))
        self.skip_time_act, self.output_scale_factor = block.skip_time_act, block.output_scale_factor
        self.train(block.training)

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W), and the time embedding (B, D), needed if the block has a projection of it -> (B, N, H, W)."""
        hidden = convolution_of_normalized(input_tensor, self.norm1, self.conv1)
        if self.time_emb_proj is not None:
            if temb is None:
                raise ValueError("this block needs a time embedding, but was called without one")
            shift = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
            hidden = hidden.add_(shift) if _may_be_overwritten(self.conv1) else hidden + shift
        hidden = convolution_of_normalized(hidden, self.norm2, self.conv2, lambda: self._straight(input_tensor))
        return hidden if self.output_scale_factor == 1 else hidden / self.output_scale_factor

    def _straight(self, input_tensor: torch.Tensor) -> torch.Tensor:
        return input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)


class ProductAttention(AttnProcessor2_0):
    """Attention in bfloat16 on processors that have it: oneDNN's products and a softmax, for some queries at a time. torch's own
    for CPUs is 1.5 times as slow with heads of 24 channels, and 3.5 times with 512. Scores are rounded to bfloat16, which costs
    nothing that shows in the image's distance to full precision.

    Everything else goes to diffusers: other devices and dtypes, masks, gradients, few tokens.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, tokens, C) or (B, C, H, W), same shape; the context is (B, tokens', C')."""
        context = hidden_states.flatten(2).transpose(1, 2) if hidden_states.dim() == 4 else hidden_states
        tokens = context
        if not _gains(attn, tokens, encoder_hidden_states, attention_mask):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if attn.group_norm is not None:
            tokens = context = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for layer, x in ((attn.to_q, tokens), (attn.to_k, context), (attn.to_v, context))
        )
        mixed = attention(query, key, value).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        y = attn.to_out[1](attn.to_out[0](mixed))
        if hidden_states.dim() == 4:
            y = y.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        return y if attn.rescale_output_factor == 1 else y / attn.rescale_output_factor


class ProductVideoAttention(WanAttnProcessor):
    """The same for self-attention of WAN's transformer."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, tokens, C), same shape; the rotary embedding's cosines and sines are (1, tokens, 1, D), every one of them twice."""
        plain = encoder_hidden_states is None and attention_mask is None and not attn.fused_projections
        if not plain or rotary_emb is None or not _gains_on_cpu(hidden_states, hidden_states.shape[1]):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        turns = torch.complex(rotary_emb[0][..., 0::2].float(), rotary_emb[1][..., 1::2].float())
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
            for x in (_turned(query, turns), _turned(key, turns), attn.to_v(hidden_states))
        )
        mixed = attention(query, key, value).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](mixed))


def _turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """(B, tokens, C) with neighbouring channels turned as complex numbers; ``turns`` is (1, tokens, 1, D / 2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, turns.shape[-1], 2)))
    return torch.view_as_real(pairs * turns).flatten(2).to(x.dtype)


FEWEST_TOKENS = 256
QUERIES, SCORES = 512, 1 << 24  # that exist at once, at most
NARROW = 128  # channels of a head up to which products with a key laid out anew are faster


def _gains(attn: Attention, tokens: torch.Tensor, context: torch.Tensor | None, mask: torch.Tensor | None) -> bool:
    fewest = min(tokens.shape[1], tokens.shape[1] if context is None else context.shape[1])
    unusual = (mask, attn.spatial_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    return all(part is None for part in unusual) and _gains_on_cpu(tokens, fewest)


def _gains_on_cpu(tokens: torch.Tensor, fewest: int) -> bool:
    return (
        tokens.device.type == "cpu"
        and dtype_on_cpu(tokens.dtype) == tokens.dtype == torch.bfloat16
        and fewest >= FEWEST_TOKENS
        and not (torch.compiler.is_compiling() or torch.is_grad_enabled())
    )


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T / sqrt(D)) value, (B, N, D) by (B, M, D) twice -> (B, N, D)."""
    query, key = query * query.shape[-1] ** -0.5, key.transpose(1, 2)
    if key.shape[1] <= NARROW:
        key = key.contiguous()
    rows = min(QUERIES, max(1, SCORES // (key.shape[0] * key.shape[2])))
    parts = [torch.bmm(torch.softmax(torch.bmm(part, key), -1), value) for part in query.split(rows, dim=1)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def is_fusable(block: nn.Module) -> bool:
    """Whether `LeanResnetBlock` computes what this does: a deployed ResNet block, SiLU, no resampling, a plain time shift."""
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


def fuse(model: nn.Module) -> int:
    """Exchanges blocks, and attention of quantized layers, in place; doing it twice changes nothing.

    Returns:
        How many blocks were exchanged.
    """
    blocks: dict[str, nn.Module] = {}
    for name, block in model.named_modules():
        if isinstance(block, ResnetBlock2D) and is_fusable(block):
            blocks[name] = LeanResnetBlock(block)
        elif isinstance(block, WanResidualBlock) and frames_as_channels.is_fusable(block):
            blocks[name] = frames_as_channels.LeanVideoBlock(block)
    for name, lean in blocks.items():
        replace_module(model, name, lean)
    for module in model.modules():
        if not isinstance(module, (Attention, WanAttention)) or not isinstance(module.to_q, DeployedLayer):
            continue
        if type(module.processor) is AttnProcessor2_0:
            module.set_processor(ProductAttention())
        elif type(module.processor) is WanAttnProcessor:
            module.set_processor(ProductVideoAttention())
    return len(blocks)
