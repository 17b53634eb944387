"""diffusers' attention, with one quantization of what queries, keys and values are made of."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention

from qartsr_pipeline.kernels import shared_input
from qartsr_pipeline.quantization.deployed import DeployedLayer


class SharedInputAttention(Attention):
    """What `fuse` makes of an `Attention` by giving it this class: modules, names and processor stay as they are."""

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        """As `Attention.forward`."""
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        with shared_input([layer for layer in projections(self) if isinstance(layer, DeployedLayer)]):
            return super().forward(*args, **kwargs)


def projections(attention: Attention) -> tuple[torch.nn.Module | None, ...]:
    """Its layers that may share their input."""
    return attention.to_q, attention.to_k, attention.to_v
