"""Stored weight codes as the integers that are multiplied."""

from __future__ import annotations

import torch

from qartsr_pipeline.arithmetic.packing import unpack
from qartsr_pipeline.kernels.layer_spec import StoredLayer


def weight_bytes(layer: StoredLayer) -> torch.Tensor:
    """Centred weight codes as int8: (N, C) of a linear layer, (N, C, kh, kw) of a convolution, channels-last."""
    spec = layer.spec
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    codes = unpack(layer.weight_packed, spec.weight_bits, taps * spec.in_channels).contiguous().view(torch.int8)
    if spec.weight_bits < 8:
        codes = codes - layer.weight_zero_point.view(torch.int8)[:, None]  # both below 64
    if spec.kind == "linear":
        return codes
    return codes.view(-1, *spec.kernel_size, spec.in_channels).permute(0, 3, 1, 2)  # stored (N, kh, kw, C)
