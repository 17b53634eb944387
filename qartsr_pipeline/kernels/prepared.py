"""What backends make of a layer's weights once and keep in memory: never stored, made again when the layer's tensors change."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeVar

import torch

LOW_MEMORY_VARIABLE = "QARTSR_LOW_MEMORY"
_low_memory: ContextVar[bool | None] = ContextVar("qartsr_low_memory", default=None)


class _HasBuffers(Protocol):
    _buffers: dict[str, torch.Tensor | None]


Layer = TypeVar("Layer", bound=_HasBuffers)
Made = TypeVar("Made")


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
    """Whether `low_memory` or QARTSR_LOW_MEMORY is in force."""
    chosen = _low_memory.get()
    return os.environ.get(LOW_MEMORY_VARIABLE, "0") not in ("", "0") if chosen is None else chosen


class PreparedWeights:
    """Holds what backends prepared for one layer. Copies and pickles of it are empty.

    Args:
        keeps: False prepares anew in every call, for layers whose tensors come and go with each call (offloading).
    """

    def __init__(self, keeps: bool = True):
        self.keeps = keeps
        self._entries: dict[Hashable, tuple[tuple[torch.Tensor | None, ...], Any]] = {}

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[bool]]:
        return type(self), (self.keeps,)

    def get(self, layer: Layer, key: Hashable, make: Callable[[Layer], Made]) -> Made:
        """`make(layer)`, or what it returned before under this key, if the layer still has the same tensors.

        Tensors count as the same while they are the same objects; code that writes into one must call `clear`.
        """
        if not self.keeps:
            return make(layer)
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

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are kept, other than the layer's own."""
        return sum(_bytes_besides(sources, made) for sources, made in self._entries.values())


def _bytes_besides(sources: tuple[torch.Tensor | None, ...], made: object) -> int:
    own = {_address(source) for source in sources if source is not None}
    return sum(t.numel() * t.element_size() for t in _tensors(made) if t.is_mkldnn or _address(t) not in own)


def _tensors(made: object) -> Iterator[torch.Tensor]:
    """The tensors in a dataclass and in the dataclasses inside it."""
    for value in vars(made).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
