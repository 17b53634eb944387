"""What the CPU backends share: the 16-bit branch through oneDNN's float kernels, and feature maps as rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer

BRANCH_OPERATORS = ("mkldnn._linear_pointwise", "mkldnn._convolution_pointwise_")


@dataclass(frozen=True)
class Branch:
    """Both factors in the dtype computed in; `down` (r, C) has phi in it."""

    down: torch.Tensor
    up: torch.Tensor


def prepare_branch(layer: StoredLayer, dtype: torch.dtype) -> Branch | None:
    """None at rank 0."""
    if not layer.spec.rank:
        return None
    return Branch((layer.branch_down * layer.smooth).to(dtype), layer.branch_up.to(dtype))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the branch is computed in and the product is returned in, for inputs of this dtype; float16 is too slow or absent on
    processors, and so is bfloat16 on older ones.
    """
    fast = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def hidden_rows(rows: torch.Tensor, branch: Branch) -> torch.Tensor:
    """(rows, C) -> (rows, r), the branch's down-projection. oneDNN's: the BLAS is several times slower for so few outputs."""
    return torch.ops.mkldnn._linear_pointwise(rows.to(branch.down.dtype), branch.down, None, "none", [], "")


def add_branch(y: torch.Tensor, hidden: torch.Tensor, branch: Branch, spec: LayerSpec) -> None:
    """y (B, N, H', W') += the up-convolution of hidden (B, r, H, W), in place and in the convolution's own epilogue."""
    torch.ops.mkldnn._convolution_pointwise_(
        y, hidden, branch.up, None, spec.padding, spec.stride, (1, 1), 1, "add", 1.0, None, [], None
    )


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B H W, C), a view of channels-last input."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_map(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B H W, K) -> (B, K, H, W) channels-last, for B, H and W of `x`."""
    return rows.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)
