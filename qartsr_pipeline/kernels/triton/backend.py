"""The Triton backend: packed weights of 2 to 8 bits by signed bytes on NVIDIA GPUs, nothing unpacked in memory.

A layer is two kernels: one pass over the input that quantizes it and computes the branch's hidden values, and the product, which
does all the rest. A GroupNorm, with SiLU or without, can happen in the quantizing pass, and a residual can be added in the
product's (`norm_conv2d`). Needs compute capability 8.0: Triton compiles no signed-byte product for older ones (triton 3.9 fails
on 7.5).

With TRITON_INTERPRET=1 the same kernels run on a CPU in Triton's interpreter, thousands of times slower: for tests.

Triton is an optional package: the modules that hold kernels, and Triton with them, are imported at the first call.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import nn

from qartsr_pipeline.kernels.backend import Backend, Constraints, NormFusion
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.triton import interpreted

COMPILED = (Constraints(device="cuda", capability=(8, 0)),)
INTERPRETED = (Constraints(device="cpu"),)


class Triton(Backend, NormFusion):
    """NVIDIA GPUs from Ampere on."""

    name = "triton"

    @property
    def constraints(self) -> tuple[Constraints, ...]:
        return INTERPRETED if interpreted() else COMPILED

    def unavailable(self) -> str | None:
        return "the package triton is not installed" if find_spec("triton") is None else super().unavailable()

    def preferred_for(self, spec: LayerSpec) -> bool:
        return False  # until its kernels have run on a GPU, which `benchmarks/triton_gpu_check.py` is for

    def prepare(self, layer: StoredLayer, dtype: torch.dtype) -> None:
        from qartsr_pipeline.kernels.triton.product import product_constants

        product_constants(layer)

    def norm_fusion(self) -> NormFusion:
        return self

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        from qartsr_pipeline.kernels.triton.product import linear

        return linear(x, layer)

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """The result is channels-last."""
        from qartsr_pipeline.kernels.triton.conv import conv2d

        return conv2d(x, layer)

    def group_scale_shift(self, x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        from qartsr_pipeline.kernels.triton.norm import group_scale_shift

        return group_scale_shift(x, norm)

    def norm_conv2d(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        layer: StoredLayer,
        silu: bool,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The normalized feature map is never written to memory."""
        from qartsr_pipeline.kernels.triton.conv import conv2d
        from qartsr_pipeline.kernels.triton.quantize import ChannelNorm

        return conv2d(x, layer, residual, ChannelNorm(scale, shift, silu))
