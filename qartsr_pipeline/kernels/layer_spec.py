"""What a backend must know about a layer: to say whether it can compute it, and to compute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from qartsr_pipeline.kernels.prepared import PreparedWeights


@dataclass(frozen=True)
class LayerSpec:
    """Static facts of one deployed layer. Linear layers have kernel_size, stride (1, 1) and padding (0, 0)."""

    kind: str  # "linear" or "conv2d"
    weight_bits: int
    activation_bits: int
    rank: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)


class StoredLayer(Protocol):
    """A deployed layer as a backend reads it. What each buffer holds, and when it is None: `docs/stored_format.md`, section 3.

    `prepared` is where a backend keeps what it made of them, `number` what `compiled` finds the layer by.
    """

    spec: LayerSpec
    number: int
    prepared: PreparedWeights
    weight_packed: torch.Tensor | None
    weight_scale: torch.Tensor | None
    weight_zero_point: torch.Tensor | None
    weight: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_zero_point: torch.Tensor | None
    smooth: torch.Tensor
    branch_down: torch.Tensor | None
    branch_up: torch.Tensor | None
    bias: torch.Tensor | None
