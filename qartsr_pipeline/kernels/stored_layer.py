"""What a backend knows about a layer: its static facts, its stored tensors, and what was made of these and is kept in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass
from typing import Any, Protocol, TypeVar

import torch

LOW_MEMORY_VARIABLE = "QARTSR_LOW_MEMORY"
_low_memory: ContextVar[bool | None] = ContextVar("qartsr_low_memory", default=None)


@dataclass(frozen=True)
class LayerSpec:
    """Static facts of one deployed layer. Linear layers have kernel_size (1, 1), stride (1, 1) and padding (0, 0).

    `grid`, `rotation` and `exponents` are those of `quantization.scheme.LayerScheme`; the rotation is the layer's own size.
    """

    kind: str  # "linear" or "conv2d"
    weight_bits: int
    activation_bits: int
    rank: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    grid: str = "tensor"
    rotation: int = 0
    exponents: bool = False

    @property
    def taps(self) -> int:
        """Weights for each pair of input and output channel: kh kw."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def carried_bits(self) -> int:
        """Bits of the activations' codes as they are multiplied: exponents are in the codes, which then fill a byte."""
        return 8 if self.exponents else self.activation_bits

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel is made of the input pixel at the same place alone."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def hides_what_is_not_finite(self) -> bool:
        """Whether NaN or infinity in the input can be missing in the output: the quantize step makes integers of them. 16-bit
        activations pass them on, and so does a branch that reads every pixel, and a token's scale.
        """
        all_read = all(step <= kernel for step, kernel in zip(self.stride, self.kernel_size, strict=True))
        return self.activation_bits < 16 and self.grid == "tensor" and not (self.rank and all_read)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The layer's output shape for an input of this shape: (..., C), (C, H, W) or (B, C, H, W)."""
        if self.kind == "linear":
            return (*shape[:-1], self.out_channels)
        sides = (
            (side + 2 * padding - kernel) // stride + 1
            for side, padding, kernel, stride in zip(shape[-2:], self.padding, self.kernel_size, self.stride, strict=True)
        )
        return (*shape[:-3], self.out_channels, *sides)


class StoredLayer(Protocol):
    """A deployed layer as a backend reads it. What each buffer holds: `docs/stored_format.md`, section 3.

    Buffers that the spec has no use for are None (those of the branch at rank 0, for instance). Code looks at the spec before it
    reads them, so their types leave None out; only a bias may be there or not.

    Attributes:
        number: what `dispatch` finds the layer by within `torch.compile`.
        prepared: where a backend keeps what it made of the buffers.
    """

    spec: LayerSpec
    number: int
    prepared: PreparedWeights
    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    weight: torch.Tensor
    input_scale: torch.Tensor
    input_zero_point: torch.Tensor
    input_exponents: torch.Tensor
    smooth: torch.Tensor
    branch_down: torch.Tensor
    branch_up: torch.Tensor
    bias: torch.Tensor | None
    _buffers: dict[str, torch.Tensor | None]


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
    """Holds what backends prepared for one layer: never stored, made again when its tensors change. Copies and pickles are empty.

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
