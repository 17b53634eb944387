"""diffusers' attention, with one quantization of what queries, keys and values are made of."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from qartsr_pipeline.kernels import choose_backend, shared_input
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
        if torch.compiler.is_compiling() or not _may_share(projections(self), hidden_states.device.type):
            return super().forward(*arguments, **cross_attention_kwargs)
        with shared_input(projections(self)):
            return super().forward(*arguments, **cross_attention_kwargs)


def projections(attention: Attention) -> tuple[nn.Module | None, ...]:
    """Its layers that may share their input."""
    return attention.to_q, attention.to_k, attention.to_v


def _may_share(layers: tuple[nn.Module | None, ...], device: str) -> bool:
    """Whether all are quantized layers of one backend that nobody does anything around: a hook may change the input, offloading
    take the weights away, a graph of a layer's own reuse memory.
    """
    return (
        all(isinstance(layer, DeployedLayer) for layer in layers)
        and not any(has_hooks(layer) or other_forward(layer) or layer._compiled_call_impl for layer in layers)
        and len({choose_backend(layer.spec, device).NAME for layer in layers}) == 1
    )
