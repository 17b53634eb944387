"""Layers of one input that quantize it once, such as an attention's queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from operator import is_
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from qartsr_pipeline.kernels.layer_spec import StoredLayer

INPUT_QUANTIZER = ("smooth", "input_scale", "input_zero_point")
Operand = TypeVar("Operand")


@dataclass
class _SharedInput:
    """The layers of a context, and what a backend made for those that have not been called: operands by the layer's number."""

    layers: tuple[StoredLayer, ...]
    name: str = ""
    x: torch.Tensor | None = None
    version: int = 0
    operands: dict[int, Any] = field(default_factory=dict)

    def holds(self, name: str, x: torch.Tensor, layer: StoredLayer) -> bool:
        return self.x is x and (self.name, self.version) == (name, _version(x)) and layer.number in self.operands

    def give(self, name: str, x: torch.Tensor, operands: Sequence) -> None:
        self.name, self.x, self.version = name, x, _version(x)
        self.operands = {layer.number: operand for layer, operand in zip(self.layers, operands, strict=True)}

    def take(self, layer: StoredLayer) -> Any:
        """Once; when all are taken nothing is held any more."""
        operand = self.operands.pop(layer.number)
        if not self.operands:
            self.x = None
        return operand


@dataclass(frozen=True)
class _Verdict:
    """Whether layers quantize alike. Kept because comparing values makes a GPU wait; good as long as these are the very objects,
    tensors in these versions, and what stands for nobody having cleared what was prepared of a layer.
    """

    objects: list[object]
    versions: list[int]
    alike: bool


_shared: ContextVar[_SharedInput | None] = ContextVar("qartsr_shared_input", default=None)
_verdicts: WeakKeyDictionary[StoredLayer, _Verdict] = WeakKeyDictionary()


@contextmanager
def shared_input(layers: Sequence[StoredLayer]) -> Iterator[None]:
    """Within this context linear layers that quantize alike quantize once, if they are called with the very same tensor.

    Nothing may change it in place between their calls in `torch.inference_mode`, whose tensors do not tell.
    """
    token = _shared.set(_SharedInput(tuple(layers)))
    try:
        yield
    finally:
        _shared.reset(token)


def shared_operand(
    name: str, x: torch.Tensor, layer: StoredLayer, make: Callable[[Sequence[StoredLayer]], Sequence[Operand]]
) -> Operand:
    """What a backend makes of a layer's input, or made of it when another layer of the context was called.

    Args:
        name: the backend's, because each has operands of its own form.
        x: the input as the layer got it.
        make: gives an operand for each of these layers.
    """
    shared = None if torch.compiler.is_compiling() else _shared.get()
    if shared is None or not any(layer is one for one in shared.layers) or not quantize_alike(shared.layers, x.device):
        return make((layer,))[0]
    if not shared.holds(name, x, layer):
        shared.give(name, x, make(shared.layers))
    return shared.take(layer)


def shared_codes(
    name: str, x: torch.Tensor, layer: StoredLayer, quantize: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`shared_operand` where it is the same for all: x (..., C) as contiguous rows (R, C), and `quantize(rows)`."""

    def make(layers: Sequence[StoredLayer]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return [(rows, quantize(rows))] * len(layers)

    return shared_operand(name, x, layer, make)


def quantize_alike(layers: Sequence[StoredLayer], device: torch.device) -> bool:
    """Whether smoothing, scale, zero point and bits are equal, and all of them are on the device, not offloaded."""
    quantizers = [[getattr(layer, name) for name in INPUT_QUANTIZER] for layer in layers]
    tensors = [tensor for quantizer in quantizers for tensor in quantizer]
    if len({layer.spec.activation_bits for layer in layers}) > 1 or any(t is None or t.device != device for t in tensors):
        return False
    objects, versions = [*tensors, *(layer.prepared.state for layer in layers)], [_version(tensor) for tensor in tensors]
    known = _verdicts.get(layers[0])
    if known is None or known.versions != versions or not all(map(is_, known.objects, objects)):
        first, *others = quantizers
        alike = all(torch.equal(one, other) for quantizer in others for one, other in zip(first, quantizer, strict=True))
        known = _verdicts[layers[0]] = _Verdict(objects, versions, alike)
    return known.alike


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
