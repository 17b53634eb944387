"""Rotations of WAN's transformer that cost nothing at run time: they go into the weights before quantization, exactly.

Outliers of a few channels are spread over a block of them, as in QuaRot (arXiv 2404.00456), and activations need no rotation:

- The residual stream is rotated, x' = G x: layers that write it have G W, those that read it W G^T. The norms between them have
  no weights (`fold_wan`). They take off the mean and divide by the deviation, which G changes neither of if G 1 = 1. A Hadamard
  matrix H turns 1 into one coordinate, so G = H diag(1, O) H with an orthogonal O, here a random one.
- Values of self-attention are rotated head by head with a Hadamard matrix, and the output projection, which reads them, as well.

What is left is the input of the second feed-forward layer, behind GELU: it is rotated at run time.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn

from qartsr_pipeline.arithmetic.token_grid import rotated, rotation_size
from qartsr_pipeline.quantization.fold_wan import FoldedConditions, FoldedCrossAttention, assign

SEED = 0
ROTATED_ONLINE = ("*.ffn.net.2",)  # patterns of the layers whose input is not rotated here


def residual_rotation(size: int) -> torch.Tensor:
    """G, (size, size) float64, orthogonal, with G 1 = 1; size is a power of two."""
    generator = torch.Generator().manual_seed(SEED)
    random, upper = torch.linalg.qr(torch.randn(size - 1, size - 1, dtype=torch.float64, generator=generator))
    inner = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), random * upper.diagonal().sign())
    hadamard = rotated(torch.eye(size), size).double()
    hadamard = hadamard.sign() * size**-0.5  # in float32 its numbers are rounded
    return hadamard @ inner @ hadamard


@torch.no_grad()
def rotate_wan(transformer: WanTransformer3DModel, most: int = 256) -> None:
    """Rotates in place, in blocks of up to ``most`` channels. Parameters are replaced, not written to.

    Raises:
        ValueError: the transformer is not folded.
    """
    if not isinstance(transformer.condition_embedder, FoldedConditions):
        raise ValueError("only a folded transformer can be rotated: its norms must have no weights, see fold_wan")
    size = rotation_size(transformer.proj_out.in_features, most)
    if not size:
        return
    rotation = residual_rotation(size)
    _turn_output(transformer.patch_embedding, rotation)
    block: Any
    for block in transformer.blocks:
        for layer in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn2.to_q, block.ffn.net[0].proj):
            _turn_input(layer, rotation)
        for layer in (block.attn1.to_out[0], block.ffn.net[2]):
            _turn_output(layer, rotation)
        _turn_cross_attention(block.attn2, rotation)
        _turn_values(block.attn1, most)
    _turn_input(transformer.proj_out, rotation)


def _turn_cross_attention(attention: FoldedCrossAttention, rotation: torch.Tensor) -> None:
    if attention.to_out is not None:
        _turn_output(attention.to_out, rotation)
        return
    for name in ("values", "bias"):
        buffer = attention.get_buffer(name)
        attention.register_buffer(name, _turned(buffer, rotation).to(buffer))


def _turn_values(attention: Any, most: int) -> None:
    size = rotation_size(attention.inner_dim // attention.heads, most)
    if size:
        hadamard = rotated(torch.eye(size), size).double().sign() * size**-0.5
        _turn_output(attention.to_v, hadamard)
        _turn_input(attention.to_out[0], hadamard)


def _turned(values: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """(..., C) with every block of its last dimension rotated; float64, on the CPU."""
    return (values.to("cpu", torch.float64).unflatten(-1, (-1, len(rotation))) @ rotation.T).flatten(-2)


def _turn_input(layer: nn.Linear, rotation: torch.Tensor) -> None:
    """layer'(G x) = layer(x)."""
    assign(layer, "weight", _turned(layer.weight, rotation))


def _turn_output(layer: nn.Linear | nn.Conv3d, rotation: torch.Tensor) -> None:
    """layer'(x) = G layer(x)."""
    assign(layer, "weight", _turned(layer.weight.movedim(0, -1), rotation).movedim(-1, 0))
    if layer.bias is not None:
        assign(layer, "bias", _turned(layer.bias, rotation))
