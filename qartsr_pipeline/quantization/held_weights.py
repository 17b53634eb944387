"""Frozen weights held in 16 bits while everything is computed in float32: half the memory of a large model.

A held layer widens its weight for its own call only, and keeps the 16 bits for the gradient of its input. Only weights are held:
what is trained, norms, biases and feature maps stay float32. Where the checkpoint stores 16 bits, float32 weights are the same
numbers, so the results are the same, bit for bit, if it is the same 16-bit type.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

FEWEST = 1 << 10  # weights of a layer that is held


def hold_weights(model: nn.Module, dtype: torch.dtype) -> int:
    """Casts the weights of plain linear layers and convolutions, in place; nothing for float32.

    The first parameter of the model keeps its dtype, because diffusers takes it for what the model computes in, and small
    layers keep theirs.

    Args:
        model: in float32.
        dtype: float32, float16 or bfloat16.

    Returns:
        How many layers are held.

    Raises:
        ValueError: a weight is too large for float16; the message names it.
    """
    if dtype == torch.float32:
        return 0
    first = next(model.parameters(), None)
    count = 0
    for name, layer in model.named_modules():
        if type(layer) not in (nn.Linear, nn.Conv2d) or layer.weight is first or layer.weight.numel() < FEWEST:
            continue
        held = layer.weight.detach().to(dtype)
        if not bool(torch.isfinite(held).all()):
            raise ValueError(f"{name}.weight has values above 65504, which float16 cannot hold: choose bfloat16 or float32")
        layer.weight = nn.Parameter(held, requires_grad=False)
        layer.forward = partial(forward_of_held, layer)
        count += 1
    return count


@torch.no_grad()
def release_weights(model: nn.Module) -> None:
    """Gives layers that are still held float32 weights and their own forward again, in place."""
    for layer in model.modules():
        forward = layer.__dict__.get("forward")
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and isinstance(forward, partial) and forward.func is forward_of_held:
            del layer.forward
            layer.weight = nn.Parameter(layer.weight.float(), requires_grad=False)


def forward_of_held(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer or convolution in x's dtype, whatever dtype its weight is held in."""
    held, dtype = layer.weight, x.dtype
    if held.dtype == dtype:
        return _product(layer, x, held)
    wide = held.to(dtype)
    if not torch.is_grad_enabled():
        return _product(layer, x, wide)
    place = wide.data_ptr()

    def pack(saved: torch.Tensor) -> torch.Tensor | tuple[torch.Size, tuple[int, ...]]:
        return (saved.shape, saved.stride()) if saved.data_ptr() == place else saved

    def unpack(kept: torch.Tensor | tuple[torch.Size, tuple[int, ...]]) -> torch.Tensor:
        return kept if isinstance(kept, torch.Tensor) else held.to(dtype).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return _product(layer, x, wide)


def _product(layer: nn.Linear | nn.Conv2d, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, layer.bias)
    return F.linear(x, weight, layer.bias)
