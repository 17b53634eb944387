"""What backends make of a layer's weights once and keep beside it: never stored, made again when the layer's tensors change."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

LOW_MEMORY_VARIABLE = "QARTSR_LOW_MEMORY"
T = TypeVar("T")
_low_memory: ContextVar[bool | None] = ContextVar("qartsr_low_memory", default=None)


@contextmanager
def low_memory(enabled: bool = True) -> Iterator[None]:
    """Within this context nothing is kept: weights are unpacked, used and dropped in every call, which is slower.

    The environment variable QARTSR_LOW_MEMORY=1 does the same for the whole process.
    """
    token = _low_memory.set(enabled)
    try:
        yield
    finally:
        _low_memory.reset(token)


def saves_memory() -> bool:
    """Whether nothing is to be kept."""
    chosen = _low_memory.get()
    return os.environ.get(LOW_MEMORY_VARIABLE, "0") not in ("", "0") if chosen is None else chosen


class PreparedWeights:
    """Holder of what backends prepared for one layer. Copies and pickles of it are empty.

    Attributes:
        keeps: whether it holds anything from call to call.
        state: another object after every `clear`, for who keeps something of the layer elsewhere.
    """

    keeps = True

    def __init__(self):
        self._entries: dict[Any, tuple[tuple, Any]] = {}
        self.state = object()

    def __reduce__(self) -> tuple:
        return PreparedWeights, ()

    def get(self, layer: nn.Module, key: Any, make: Callable[[Any], T]) -> T:
        """`make(layer)`, or what it made before under this key, if the layer still has the same tensors.

        Tensors count as the same while they are the same objects; who writes into one calls `clear`.
        """
        sources = tuple(layer._buffers.values())
        entry = self._entries.get(key)
        if entry is not None and all(old is new for old, new in zip(entry[0], sources, strict=True)):
            return entry[1]
        made = make(layer)
        if not saves_memory():
            self._entries[key] = (sources, made)
        return made

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self.state = object()

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are kept, other than the layer's own."""
        return sum(_bytes_besides(sources, made) for sources, made in self._entries.values())


def _bytes_besides(sources: tuple, made: Any) -> int:
    tensors = [value for value in vars(made).values() if isinstance(value, torch.Tensor)]
    own = {_address(source) for source in sources if source is not None}
    return sum(t.numel() * t.element_size() for t in tensors if t.is_mkldnn or _address(t) not in own)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
