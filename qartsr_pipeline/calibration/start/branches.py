"""How the 16-bit low-rank branch of a layer starts: from its weight, then from what quantization leaves of its outputs.

Weights are "unfolded" here, (N * taps, C): a convolution's branch goes through ``rank`` channels at every position, and each tap
of its kernel counts as outputs of its own, as if the taps' inputs were independent (our reading).
"""

from __future__ import annotations

import weakref

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qartsr_pipeline.kernels.int_mm import has_vnni
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear, CalibratingMixin

FULL_SVD = 512  # sides up to which all singular vectors are computed
LARGE = 1 << 20  # weights of a layer from which what can be computed once, or in bytes, is
_outputs = WeakTensorKeyDictionary()  # rows -> reference to a weight, outputs


def unfolded(weight: torch.Tensor) -> torch.Tensor:
    """(N, C, kh, kw) or (N, C) -> (N * taps, C)."""
    return weight.movedim(1, -1).reshape(-1, weight.shape[1])


def leading_vectors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The leading singular vectors and values: u (rows, rank), s (rank,), vh (rank, columns).

    Those of large matrices by random projections (Halko et al., arXiv 0909.4061): with thousands of channels, a full
    decomposition takes minutes.
    """
    if min(matrix.shape) <= FULL_SVD:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], vh[:rank]
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(rank + 16, *matrix.shape), niter=4)
    return u[:, :rank], s[:rank], v.T[:rank]


@torch.no_grad()
def branch_from_weight(layer: CalibratingMixin, left: torch.Tensor | None = None) -> None:
    """The leading singular vectors of the smoothed weight, with what is merged into it, less ``left``, of its shape."""
    if not layer.has_branch:
        return
    smoothed = unfolded(layer.merged_weight()) / layer.smooth
    u, s, vh = leading_vectors(smoothed if left is None else smoothed - unfolded(left), layer.branch_down.shape[0])
    root = s.sqrt()
    _store(layer, u * root, vh * root[:, None])


def _store(layer: CalibratingMixin, up: torch.Tensor, down: torch.Tensor) -> None:
    """``up`` (N * taps, rank) and ``down`` (rank, C), for smoothed inputs."""
    up = up.view(layer.weight.shape[0], *layer.weight.shape[2:], -1)
    layer.branch_up.copy_(up.movedim(-1, 1))
    layer.branch_down.copy_(down * layer.smooth)


def left_by_quantization(layer: CalibratingMixin, rows: torch.Tensor) -> torch.Tensor:
    """(positions, N * taps): outputs for inputs (positions, C), less what the quantized residual weight makes of them."""
    if layer.weight.numel() < LARGE:
        quantized = layer.quantized_input(rows, layer.smooth) @ unfolded(layer.qweight).T
        return rows @ unfolded(layer.weight.float()).T - quantized
    return _full_precision(layer, rows) - _quantized(layer, rows)


def _full_precision(layer: CalibratingMixin, rows: torch.Tensor) -> torch.Tensor:
    """Outputs of the original weight; those of the last layer that these very rows were asked for are remembered."""
    remembered = _outputs.get(rows)
    if remembered is None or remembered[0]() is not layer.weight:
        remembered = weakref.ref(layer.weight), rows @ unfolded(layer.weight.float()).T
        _outputs[rows] = remembered
    return remembered[1]


def _quantized(layer: CalibratingMixin, rows: torch.Tensor) -> torch.Tensor:
    """What the quantized residual weight makes of inputs, as a product of bytes where that is exact and faster."""
    scheme = layer.layer_scheme
    fits = type(layer) in (CalibratingLinear, CalibratingConv2d) and scheme.activation_bits <= 6 and scheme.weight_bits <= 8
    if not fits or rows.device.type != "cpu" or not has_vnni():
        return layer.quantized_input(rows, layer.smooth) @ unfolded(layer.qweight).T
    scale, zero_point = layer.input_parameters()
    codes = layer.codes(rows, layer.smooth / scale, zero_point, scheme.activation_bits).to(torch.int8)
    weight = unfolded(layer.weight_codes().to(torch.int8))
    scales = layer.weight_parameters()[0].repeat_interleave(len(weight) // layer.weight.shape[0])
    return torch._int_mm(codes, weight.t()) * (scale * scales)


@torch.no_grad()
def fit_branch(layer: CalibratingMixin, rows: torch.Tensor) -> None:
    """The branch that brings the quantized layer's outputs on a sample closest to full precision's, all else being as it is.

    Given the quantized residual weight R and inputs q, the branch B of that rank which minimises |X W^T - q R^T - x B^T|, x being
    the smoothed inputs: reduced-rank regression, as in QERA (arXiv 2410.06040), here also for what the inputs lose. A ridge holds
    it to the branch that is there, the more the fewer positions there are for each channel: what a sample does not show is left
    as it is. What is merged into the weight takes up the change of the branch, so that R stays as it is; an adapter does so as
    far as its rank goes.

    Args:
        layer: has a branch; its smoothing, bounds and branch are set.
        rows: X, (positions, C), less the offset.
    """
    smoothed, residual = rows * layer.smooth, layer.residual_weight()
    before = torch.einsum("nr...,rc->nc...", *layer.stored_branch())
    gram = smoothed.T @ smoothed
    ridge = gram.diagonal().mean().clamp(min=1e-12) * gram.shape[0] / len(rows)
    gram.diagonal().add_(ridge)
    wanted = smoothed.T @ left_by_quantization(layer, rows) + ridge * unfolded(before).T
    if gram.device.type == "mps":  # has no Cholesky decomposition before torch 2.7
        gram, wanted = gram.cpu(), wanted.cpu()
    root = torch.linalg.cholesky(gram)
    whitened = torch.linalg.solve_triangular(root, wanted, upper=False)
    u, s, vh = leading_vectors(whitened, layer.branch_down.shape[0])
    down = torch.linalg.solve_triangular(root.T, u, upper=True).T
    balance = (s / down.norm(dim=1).clamp(min=1e-12)).sqrt().clamp(min=1e-12)  # |up| = |down|, which trains best
    _store(layer, vh.T * (s / balance), down * balance[:, None])
    if merges(layer):
        change = layer.transform_rows(residual - layer.residual_weight()) * layer.smooth.view(1, -1, *[1] * (residual.dim() - 2))
        merged = layer.merged_weight() - layer.weight.float()
        merge(layer, merged + change)


def merges(layer: CalibratingMixin) -> bool:
    """Whether something is merged into the layer's weight: an adapter, or a change of the whole weight."""
    return "adapter_up" in layer._parameters or "weight_change" in layer._parameters


@torch.no_grad()
def merge(layer: CalibratingMixin, difference: torch.Tensor) -> None:
    """Has ``difference``, of the weight's shape, merged into the weight; with an adapter as far as its rank goes."""
    if "weight_change" in layer._parameters:
        layer.get_parameter("weight_change").copy_(difference)
    else:
        set_adapter(layer, difference)


@torch.no_grad()
def set_adapter(layer: CalibratingMixin, difference: torch.Tensor) -> None:
    """F1 F2 = ``difference``, of the weight's shape, as far as the adapter's rank goes.

    Rows of F2 have length 1, as about those of a new layer, so that directions without difference are trained as well.
    """
    u, s, vh = leading_vectors(difference.flatten(1), layer.adapter_down.shape[0])
    layer.adapter_up.zero_()[:, : len(s)] = u * s
    layer.adapter_down[: len(s)] = vh
