"""The embedding of a prompt's text, with CLIP's text encoder as Stable Diffusion 2.1 and OSEDiff use it."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qartsr_pipeline.quantization.fold import FoldedConstant


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
