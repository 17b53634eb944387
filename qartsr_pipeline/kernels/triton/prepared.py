"""What the Triton kernels need of a layer's weights beside what is stored: a few bytes per output, made once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qartsr_pipeline.arithmetic.packing import unpack
from qartsr_pipeline.kernels.layer_spec import StoredLayer


@dataclass(frozen=True)
class TritonWeights:
    """Attributes:
    code_sums: sums of an output's centred weight codes, int32 (N,); None unless activations have 8 bits.
    branch_up: as stored, but with the rank fastest in memory.
    """

    code_sums: torch.Tensor | None
    branch_up: torch.Tensor | None


def code_sums(layer: StoredLayer) -> torch.Tensor:
    """Sum of the centred codes of every output: int32 (N,)."""
    spec = layer.spec
    length = spec.in_channels * spec.kernel_size[0] * spec.kernel_size[1]
    codes = unpack(layer.weight_packed, spec.weight_bits, length)
    if spec.weight_bits == 8:
        return codes.view(torch.int8).sum(1, dtype=torch.int32)
    return codes.sum(1, dtype=torch.int32) - length * layer.weight_zero_point.to(torch.int32)


def prepare(layer: StoredLayer) -> TritonWeights:
    """Makes them."""
    up = layer.branch_up
    if up is not None and up.dim() == 4:
        up = up.contiguous(memory_format=torch.channels_last)
    return TritonWeights(code_sums(layer) if layer.spec.activation_bits == 8 else None, up)
