"""The prompt embedding a one-step model was trained with, stored as a component of the pipeline.

A super-resolution model of this kind is always called with the same prompt, so its checkpoint carries the embedding instead of a
text encoder. diffusers looks a component's base class up in the namespace of the module that defines it: `ModelMixin` must stay
imported here, or saved pipelines cannot find out how to load this component.

Checkpoints that carry CLIP's text encoder as well, as Stable Diffusion 2.1 and OSEDiff use it, also take a prompt's text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

from qartsr_pipeline.quantization.fold import FoldedConstant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


@torch.no_grad()
def embed_prompt(
    text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, device: torch.device | None = None
) -> torch.Tensor:
    """The encoder's last hidden state for `prompt`: (1, tokens, dim), in the encoder's dtype.

    Args:
        prompt: padded, or cut off, to the number of tokens that the encoder was trained with (77).
        device: where the encoder computes; None for where its weights are.
    """
    longest = text_encoder.config.max_position_embeddings
    tokens = tokenizer(prompt, max_length=longest, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return embed_tokens(text_encoder, tokens, device)


@torch.no_grad()
def embed_tokens(text_encoder: PreTrainedModel, tokens: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """As `embed_prompt`, for int64 token ids (1, tokens)."""
    return text_encoder(tokens.to(device or text_encoder.device)).last_hidden_state


def check_prompt(
    prompt: object,
    unet: UNet2DConditionModel,
    text_encoder: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Checks that this model takes `prompt`. None, for the stored embedding, always passes.

    Raises:
        TypeError: not a string.
        ValueError: the prompt is folded into the UNet, or there is no text encoder or tokenizer.
    """
    if prompt is None:
        return
    if not isinstance(prompt, str):
        raise TypeError(f"`prompt` must be a string (one for all images) or None, but is {type(prompt).__name__}.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(
            "`prompt` holds half of a character (a surrogate), which no tokenizer can read. Pass text, for instance with"
            " prompt.encode('utf-8', 'replace').decode()."
        )
    if isinstance(unet.time_embedding, FoldedConstant):
        raise ValueError(
            "`prompt` has no effect on this model: its fixed prompt was folded into the weights when it was quantized."
            " Leave `prompt` out, or take the full-precision checkpoint or one quantized without folding."
        )
    if text_encoder is None or tokenizer is None:
        raise ValueError(
            "`prompt` needs a text encoder and a tokenizer, which this checkpoint does not hold. Leave `prompt` out to use the"
            " stored embedding, or pass them: from_pretrained(.., text_encoder=.., tokenizer=..)."
        )
