"""What a backend knows about a layer: its static facts and its stored tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from qartsr_pipeline.kernels.prepared import PreparedWeights


@dataclass(frozen=True)
class LayerSpec:
    """Static facts of one deployed layer. Linear layers have kernel_size (1, 1), stride (1, 1) and padding (0, 0)."""

    kind: str  # "linear" or "conv2d"
    weight_bits: int
    activation_bits: int
    rank: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    @property
    def taps(self) -> int:
        """Weights for each pair of input and output channel: kh kw."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def is_pointwise(self) -> bool:
        """Whether every output pixel is made of the input pixel at the same place alone."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)

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
        number: what `compiled` finds the layer by.
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
    smooth: torch.Tensor
    branch_down: torch.Tensor
    branch_up: torch.Tensor
    bias: torch.Tensor | None
    _buffers: dict[str, torch.Tensor | None]
