"""diffusers' attention, with one quantization of what queries, keys and values are made of."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from qartsr_pipeline.kernels import shared_input
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.surroundings import has_hooks, other_forward


class SharedInputAttention(Attention):
    """What `fuse` makes of an `Attention` by giving it this class: modules, names and processor stay as they are."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> torch.Tensor:
        """As in diffusers: (B, tokens, C) or (B, C, H, W) -> the same shape."""
        arguments = (hidden_states, encoder_hidden_states, attention_mask)
        layers = projections(self)
        if torch.compiler.is_compiling() or not all(map(_is_plain, layers)):
            return super().forward(*arguments, **cross_attention_kwargs)
        with shared_input(layers):
            return super().forward(*arguments, **cross_attention_kwargs)


def projections(attention: Attention) -> tuple[nn.Module | None, ...]:
    """Its layers that may share their input."""
    return attention.to_q, attention.to_k, attention.to_v


def _is_plain(layer: nn.Module | None) -> bool:
    """A quantized layer that nobody does anything around: a hook may change the input, offloading take the weights away."""
    return isinstance(layer, DeployedLayer) and not (has_hooks(layer) or other_forward(layer))
