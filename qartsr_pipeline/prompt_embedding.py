"""The prompt embedding a one-step model was trained with, stored as a component of the pipeline.

A super-resolution model of this kind is always called with the same prompt, so its checkpoint carries the embedding instead of a
text encoder. diffusers looks a component's base class up in the namespace of the module that defines it: `ModelMixin` must stay
imported here, or saved pipelines cannot find out how to load this component.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class PromptEmbedding(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers defines config_name twice
    """A constant, in the place of a text encoder.

    Args:
        tokens: number of tokens.
        dim: width of one token; must equal the UNet's `cross_attention_dim`.

    Attributes:
        embedding: parameter of shape (1, tokens, dim), zero until it is loaded or assigned.
    """

    @register_to_config
    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.zeros(1, tokens, dim), requires_grad=False)

    @classmethod
    def from_tensor(cls, embedding: torch.Tensor) -> PromptEmbedding:
        """Wraps an embedding of shape (1, tokens, dim) or (tokens, dim); its dtype is kept."""
        if embedding.ndim == 2:
            embedding = embedding[None]
        if embedding.ndim != 3 or embedding.shape[0] != 1:
            raise ValueError(f"`embedding` must have shape (1, tokens, dim) or (tokens, dim), but has {tuple(embedding.shape)}.")
        model = cls(tokens=embedding.shape[1], dim=embedding.shape[2])
        model.embedding = torch.nn.Parameter(embedding.detach().clone(), requires_grad=False)
        return model

    def forward(self, batch_size: int = 1) -> torch.Tensor:
        """The embedding for a batch: (batch_size, tokens, dim), a view."""
        return self.embedding.expand(batch_size, -1, -1)
