"""The interface that every backend implements."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from qartsr_pipeline.kernels.constraints import Constraints, unavailable_because, unmet
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer


class Backend(Protocol):
    """One way to compute deployed layers. A new one subclasses this, and is entered into the table in `dispatch`.

    It states its `name` and `constraints` and computes whole layers (integer product, branch, bias). What it can compute follows
    from the constraints.
    """

    @property
    def name(self) -> str:
        """As in `list_backends`, `use_backend` and QARTSR_BACKEND."""

    @property
    def constraints(self) -> tuple[Constraints, ...]:
        """What it demands of machine, device and layer, one entry for each kind of device it runs on; empty for no demands."""

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """(..., C) -> (..., N), in x's dtype."""

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, H', W'), in x's dtype."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all, None if it can."""
        return unavailable_because(self.constraints)

    def unsupported(self, spec: LayerSpec, device: str) -> str | None:
        """Why it cannot compute such a layer on this type of device ("cpu", "cuda", ...), None if it can."""
        return unmet(self.constraints, spec, device)

    def prepare(self, layer: StoredLayer, dtype: torch.dtype) -> None:
        """Makes what it keeps in `layer.prepared` for inputs of this dtype, as the layer's first call does."""
        return None

    def norm_fusion(self) -> NormFusion | None:
        """Its convolution with a GroupNorm in the same pass, None if it has none."""
        return None


class NormFusion(Protocol):
    """A convolution that applies GroupNorm and SiLU to its input while it quantizes it."""

    def group_scale_shift(self, x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x (B, C, H, W) as one factor and one summand a channel: float32 (B, C), twice."""

    def norm_conv2d(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        layer: StoredLayer,
        silu: bool,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``conv2d(silu(x * scale + shift)) + residual``, in x's dtype.

        Args:
            x: (B, C, H, W).
            scale, shift: float32 (B, C).
            silu: whether SiLU is applied.
            residual: of the output's shape and dtype; None adds nothing.
        """
