"""Folding for WAN's transformer, as `fold` does it for a UNet: exact, and done before quantization.

At one timestep T and one prompt c these are constants, and go into the layers beside them:

- the shift b, scale s and gate g of every block: W ((1 + s) x + b) = (W (1 + s)) x + W b, and g (W x + b') = (g W) x + g b';
- the affine part of the norm before cross-attention: into to_q;
- keys and values of cross-attention. Equal tokens of c have equal keys, so each kind of token stands there once, with the
  logarithm of its count added to its score. With few kinds the output projection is joined to the values,

      y = bias + sum over heads h and kinds u of p_hu (W_h v_hu)

- the shift and scale of the last norm: into proj_out.

Of WAN 2.1's shape with 1.3 billion parameters and an empty prompt, 16.8 % of the parameters go. All is computed in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from qartsr_pipeline.quantization.scheme import Folding, replace_module


class FoldedConditions(nn.Module):
    """Takes the place of `condition_embedder`: what it gave is in the weights, so now it gives zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(
        self, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        """Time embedding (B, dim) and its projection (B, 6 dim), both zero; the prompt, which nobody reads; no image."""
        zeros = encoder_hidden_states.new_zeros(timestep.shape[0], 6 * self.dim)
        return zeros[:, : self.dim], zeros, encoder_hidden_states, None


class FoldedCrossAttention(nn.Module):
    """Cross-attention to a fixed prompt of U kinds of tokens.

    Submodules: to_q, (dim, dim); to_out, (dim, dim), unless it is joined.
    Buffers: keys (U, dim), with the query norm's weight and 1 / sqrt(head size) in them; log_counts (U,); values (U, dim), or,
    if the output projection is joined to them, values (heads U, dim) and bias (dim,).
    """

    keys: torch.Tensor
    log_counts: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor

    def __init__(self, to_q: nn.Linear, heads: int, eps: float, tokens: int, to_out: nn.Linear | None):
        """Args:
        to_out: None if it is joined.
        """
        super().__init__()
        dim, device, dtype = to_q.out_features, to_q.weight.device, to_q.weight.dtype
        self.to_q, self.heads, self.eps, self.to_out = to_q, heads, eps, to_out
        self.register_buffer("keys", torch.empty(tokens, dim, device=device, dtype=dtype))
        self.register_buffer("log_counts", torch.empty(tokens, device=device, dtype=dtype))
        rows = tokens if to_out is not None else heads * tokens
        self.register_buffer("values", torch.empty(rows, dim, device=device, dtype=dtype))
        self.register_buffer("bias", None if to_out is not None else torch.empty(dim, device=device, dtype=dtype))

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """(B, S, dim) -> (B, S, dim); the prompt that it is called with is ignored."""
        query = self.to_q(hidden_states)
        query = F.rms_norm(query, query.shape[-1:], eps=self.eps).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, h, S, d)
        keys = self.keys.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (h, U, d)
        if self.to_out is None:
            scores = query @ keys.transpose(-1, -2) + self.log_counts  # (B, h, S, U)
            return F.linear(scores.softmax(-1).transpose(1, 2).flatten(2), self.values.T, self.bias)
        values = self.values.unflatten(-1, (self.heads, -1)).transpose(0, 1)
        shape = (query.shape[0], -1, -1, -1)
        attended = F.scaled_dot_product_attention(
            query, keys.expand(shape), values.expand(shape), attn_mask=self.log_counts[None], scale=1.0
        )
        return self.to_out(attended.transpose(1, 2).flatten(2))


def _is_joined(tokens: int, heads: int, dim: int) -> bool:
    """Whether values of every head at full width are fewer numbers than values and the output projection."""
    return heads * tokens < tokens + dim


def _check_foldable(transformer: WanTransformer3DModel) -> None:
    if transformer.condition_embedder.image_embedder is not None or transformer.config["added_kv_proj_dim"] is not None:
        raise ValueError("this transformer reads an image beside the prompt; folding knows only timestep and prompt")


@torch.no_grad()
def fold_wan(transformer: WanTransformer3DModel, timestep: int, prompt_embeds: torch.Tensor) -> Folding:
    """Folds in place. Afterwards the transformer ignores the timestep and the prompt that it is called with.

    Its parameters are replaced, not written to: another instance that shares them stays as it is.

    Args:
        timestep: T.
        prompt_embeds: shape (1, tokens, text_dim).

    Returns:
        What to record in the model's `QuantizationScheme`; its `tokens` are the different ones among the prompt's.

    Raises:
        ValueError: for a transformer with other conditioning, or one that is folded already.
    """
    if isinstance(transformer.condition_embedder, FoldedConditions):
        raise ValueError("this transformer is folded already")
    _check_foldable(transformer)
    kinds, counts = torch.unique(_exact(prompt_embeds[0]), dim=0, return_counts=True)
    embedder = copy.deepcopy(transformer.condition_embedder).to("cpu", torch.float64)
    time, modulation, prompt, _ = embedder(torch.tensor([timestep]), kinds[None])
    for block in transformer.blocks:
        _fold_block(block, modulation.unflatten(1, (6, -1)), prompt[0], counts.to(torch.float64).log())
    shift, scale = (_exact(transformer.scale_shift_table) + time[:, None])[0]
    _fold_input(transformer.proj_out, 1 + scale, shift)
    assign(transformer, "scale_shift_table", torch.zeros_like(transformer.scale_shift_table))
    replace_module(transformer, "condition_embedder", FoldedConditions(time.shape[-1]))
    return Folding(int(timestep), len(kinds))


def _fold_block(block: Any, modulation: torch.Tensor, prompt: torch.Tensor, log_counts: torch.Tensor) -> None:
    """`modulation`: (1, 6, dim); `prompt`: (U, dim), after the text projection."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (_exact(block.scale_shift_table) + modulation)[0]
    for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
        _fold_input(layer, 1 + scale, shift)
    _fold_output(block.attn1.to_out[0], gate)
    _fold_input(block.ffn.net[0].proj, 1 + ffn_scale, ffn_shift)
    _fold_output(block.ffn.net[2], ffn_gate)
    assign(block, "scale_shift_table", _neutral(block.scale_shift_table))
    if not isinstance(block.norm2, nn.Identity):
        _fold_input(block.attn2.to_q, _exact(block.norm2.weight), _exact(block.norm2.bias))
    _without_affine(block)
    block.attn2 = _folded_attention(block.attn2, prompt, log_counts)


def _neutral(table: torch.Tensor) -> torch.Tensor:
    """Shift 0, scale 0 and gate 1, twice."""
    return table.new_tensor([0.0, 0.0, 1.0] * 2).view(1, 6, 1).expand_as(table)


def _without_affine(block: Any) -> None:
    if not isinstance(block.norm2, nn.Identity):
        block.norm2 = type(block.norm2)(block.norm2.normalized_shape, block.norm2.eps, elementwise_affine=False)


def _folded_attention(attention: Any, prompt: torch.Tensor, log_counts: torch.Tensor) -> FoldedCrossAttention:
    """The attention (B, S, dim) -> (B, S, dim) with the prompt's keys and values in it."""
    tokens, folded = prompt.shape[0], _empty_attention(attention, prompt.shape[0])
    key = F.rms_norm(_linear64(attention.to_k, prompt), prompt.shape[-1:], _exact(attention.norm_k.weight), attention.norm_k.eps)
    key = key * _exact(attention.norm_q.weight) * (attention.inner_dim // attention.heads) ** -0.5
    value = _linear64(attention.to_v, prompt)
    if folded.to_out is None:
        out = attention.to_out[0]
        weight = _exact(out.weight).unflatten(1, (attention.heads, -1))  # (dim, h, d)
        value = torch.einsum("ohd,uhd->huo", weight, value.unflatten(-1, (attention.heads, -1)))
        value = value.reshape(attention.heads * tokens, -1)
        folded.bias.copy_(out.bias)
    for buffer, content in ((folded.keys, key), (folded.values, value), (folded.log_counts, log_counts)):
        buffer.copy_(content)
    return folded


def _empty_attention(attention: Any, tokens: int) -> FoldedCrossAttention:
    joined = _is_joined(tokens, attention.heads, attention.inner_dim)
    to_out = None if joined else attention.to_out[0]
    return FoldedCrossAttention(attention.to_q, attention.heads, attention.norm_q.eps, tokens, to_out)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, on the CPU: not every device knows it."""
    return tensor.to("cpu", torch.float64)


def _linear64(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, _exact(layer.weight), _exact(layer.bias))


def _fold_input(layer: nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """layer(scale x + shift) = layer'(x)."""
    weight = _exact(layer.weight)
    assign(layer, "bias", _exact(layer.bias) + weight @ shift)
    assign(layer, "weight", weight * scale)


def _fold_output(layer: nn.Linear, gate: torch.Tensor) -> None:
    """gate layer(x) = layer'(x)."""
    assign(layer, "weight", _exact(layer.weight) * gate[:, None])
    assign(layer, "bias", _exact(layer.bias) * gate)


def assign(module: nn.Module, name: str, values: torch.Tensor) -> None:
    """A new parameter in the place of the one of this name. Nothing is written into the old one: others may read it."""
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(values.to(old, copy=True).contiguous(), requires_grad=old.requires_grad))


def fold_wan_structure(transformer: WanTransformer3DModel, folding: Folding) -> None:
    """Gives a fresh (meta) transformer the folded structure, so that a folded checkpoint's keys find their place."""
    _check_foldable(transformer)
    block: Any
    for block in transformer.blocks:
        _without_affine(block)
        block.attn2 = _empty_attention(block.attn2, folding.tokens)
    replace_module(transformer, "condition_embedder", FoldedConditions(transformer.proj_out.in_features))
