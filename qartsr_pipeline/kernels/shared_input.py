"""Layers of one input that quantize it once, such as an attention's queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

import torch

from qartsr_pipeline.kernels.layer_spec import StoredLayer

T = TypeVar("T")


@dataclass
class _Shared:
    """The layers of a context, and what was made for them: `operands`, of input `x` in its `version`, by the backend `name`."""

    layers: tuple[StoredLayer, ...]
    name: str = ""
    x: torch.Tensor | None = None
    version: int = 0
    operands: Sequence = ()


@dataclass(frozen=True)
class _Alike:
    alike: bool


_shared: ContextVar[_Shared | None] = ContextVar("qartsr_shared_input", default=None)


@contextmanager
def shared_input(layers: Sequence[StoredLayer]) -> Iterator[None]:
    """Within this context linear layers that quantize alike quantize once, if they are called with the very same tensor."""
    token = _shared.set(_Shared(tuple(layers)) if quantize_alike(layers) else None)
    try:
        yield
    finally:
        _shared.reset(token)


def quantize_alike(layers: Sequence[StoredLayer]) -> bool:
    """Whether there is more than one, and smoothing, scale, zero point and bits are equal."""
    if len(layers) < 2:
        return False
    first, *others = layers
    key = ("quantize alike", *(layer.number for layer in others))
    return first.prepared.get(first, key, lambda layer: _Alike(all(_alike(layer, other) for other in others))).alike


def _alike(one: StoredLayer, other: StoredLayer) -> bool:
    names = ("smooth", "input_scale", "input_zero_point")
    return one.spec.activation_bits == other.spec.activation_bits < 16 and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def shared_operand(name: str, x: torch.Tensor, layer: StoredLayer, make: Callable[[Sequence[StoredLayer]], Sequence[T]]) -> T:
    """What a backend makes of a layer's input, or made of it when another layer of the context was called.

    Args:
        name: the backend's, because each has operands of its own form.
        x: the input as the layer got it.
        make: gives an operand for each of these layers.
    """
    shared = None if torch.compiler.is_compiling() else _shared.get()
    if shared is None or not any(layer is one for one in shared.layers):
        return make((layer,))[0]
    version = 0 if x.is_inference() else x._version
    if shared.x is not x or (shared.version, shared.name) != (version, name):
        shared.name, shared.x, shared.version, shared.operands = name, x, version, make(shared.layers)
    return next(operand for one, operand in zip(shared.layers, shared.operands, strict=True) if one is layer)
