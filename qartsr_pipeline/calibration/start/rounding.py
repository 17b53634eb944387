"""Rounding of a layer's weight so that the errors of its taps and channels make up for each other, on patches of its input.

With Y patches of the smoothed input, X the same quantized, and M the weight that is left beside the branch, the codes Q are
sought that minimise |Y M^T - X Q^T|^2, or |X M^T - X Q^T|^2 where inputs have 4 bits or more. The real weight of least error,
found by regression, is rounded column by column as in GPTQ (arXiv 2210.17323): a column is rounded, and its error is made up for
by the columns that are not rounded yet. What is merged into the weight becomes the difference to the original weight, so that
training starts from there; an adapter does so as far as its rank goes. The mean of the error that is left goes into the bias.
Nothing that is stored or run is larger for it.

Patches hold all taps of a convolution together: neighbours in an image are nearly equal, so errors of taps can cancel.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.arithmetic.affine import affine_parameters, code_range
from qartsr_pipeline.calibration.start.branches import merge
from qartsr_pipeline.calibration.start.observers import as_rows, row_bounds
from qartsr_pipeline.quantization.calibrating import CalibratingMixin

RIDGE = 0.01  # of the mean square of the inputs
COLUMNS = 64  # that are rounded before the others are brought up to date
COARSE = 3  # bits of inputs up to which weights make up for what these lose: with finer ones, images lose detail by it
MOST_COLUMNS, GROUP = 4096, 2048  # that are rounded together; of layers with more, in groups of so many
HELD_OUT = 4  # one patch in so many is kept to measure on


def patches_of(layer: CalibratingMixin, inputs: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) windows of a convolution's input -> (patches, C kh kw), without padding; (positions, C) stays as it is."""
    if inputs.dim() == 2:
        return inputs
    convolution = cast(nn.Conv2d, layer)
    columns = F.unfold(inputs, cast(tuple[int, int], convolution.kernel_size), stride=cast(tuple[int, int], convolution.stride))
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


@torch.no_grad()
def relative_patch_error(layer: CalibratingMixin, inputs: torch.Tensor) -> float:
    """|y_q - y|^2 / |y|^2 of the layer's output, y without bias, on patches of its input."""
    over = layer.smooth.view(1, -1, 1, 1) if inputs.dim() == 4 else layer.smooth
    smoothed = inputs * over
    wanted = patches_of(layer, inputs) @ layer.weight.float().flatten(1).T
    output = patches_of(layer, layer.quantized_input(inputs, over)) @ layer.qweight.flatten(1).T
    if layer.has_branch:
        branch = torch.einsum("nr...,rc->nc...", *layer.stored_branch())
        output = output + patches_of(layer, smoothed) @ branch.flatten(1).T
    if layer.bias is not None:
        output = output + layer.bias_change
    return float((output - wanted).square().sum()) / max(float(wanted.square().sum()), 1e-12)


class Patches:
    """Inputs of a layer as it is set up, smoothed and quantized, and some that are held out, also as they were before.

    Args:
        inputs: (B, C, h, w) windows of a convolution's input, or (positions, C).
        shift: (B, N, h', w') or (positions, N): what is wanted of outputs, beyond what the original weight gives for ``inputs``.
    """

    def __init__(self, layer: CalibratingMixin, inputs: torch.Tensor, shift: torch.Tensor | None = None):
        over = layer.smooth.view(1, -1, 1, 1) if inputs.dim() == 4 else layer.smooth
        held = torch.arange(len(inputs), device=inputs.device) % HELD_OUT == HELD_OUT - 1
        quantized = layer.quantized_input(inputs, over)
        self.quantized = patches_of(layer, quantized[~held])
        full = inputs * over
        full = layer.transform_rows(full) if inputs.dim() == 2 else full
        self.lost = patches_of(layer, full[~held]) - self.quantized  # by quantizing them
        self.shift = None if shift is None else as_rows(shift[~held])
        self._held = patches_of(layer, full[held]), patches_of(layer, quantized[held])
        self._held_shift = 0.0 if shift is None else as_rows(shift[held])

    def error(self, layer: CalibratingMixin, beside: torch.Tensor) -> float:
        """Squared error of the layer's output on what is held out; ``beside``: M, (N, K), as the quantizer sees it."""
        full, quantized = self._held
        difference = full @ beside.T - quantized @ layer.qweight.flatten(1).T + self._held_shift
        if layer.bias is not None:
            difference -= layer.bias_change
        return float(difference.square().sum())

    def mean_error(self, layer: CalibratingMixin, beside: torch.Tensor) -> torch.Tensor:
        """(N,) of each output, on what is not held out; ``beside``: M, (N, K)."""
        quantized = self.quantized.mean(0)
        error = beside @ (quantized + self.lost.mean(0)) - layer.qweight.flatten(1) @ quantized
        return error if self.shift is None else error + self.shift.mean(0)


@torch.no_grad()
def round_together(layer: CalibratingMixin, inputs: torch.Tensor, shift: torch.Tensor | None = None) -> bool:
    """Sets what is merged into the weight, its bounds, and the bias, of a layer set up otherwise, unless the error grows.

    Args:
        layer: with something merged into its weight, and fewer than 16 bits for it.
        inputs, shift: as for `Patches`.

    Returns:
        Whether it was kept.
    """
    patches = Patches(layer, inputs, shift)
    over_inputs = layer.smooth.view(1, -1, *[1] * (layer.weight.dim() - 2))
    beside = layer.weight.float() / over_inputs
    if layer.has_branch:
        beside = beside - torch.einsum("nr...,rc->nc...", *layer.stored_branch())
    shape, matrix = beside.shape, layer.transform_rows(beside).flatten(1)
    before = patches.error(layer, matrix)
    names = ("adapter_up", "adapter_down", "weight_change", "weight_lower", "weight_upper", "bias_change")
    kept = {name: layer.get_parameter(name).clone() for name in names if name in layer._parameters}
    in_groups = matrix.shape[1] > MOST_COLUMNS
    rounded = _rounded_in_groups(layer, matrix, patches) if in_groups else _rounded_whole(layer, matrix, patches)
    merge(layer, layer.transform_rows((rounded - matrix).view(shape)) * over_inputs)
    if layer.bias is not None:
        layer.bias_change.copy_(patches.mean_error(layer, matrix))
    if patches.error(layer, matrix) < before:
        return True
    for name, value in kept.items():
        layer.get_parameter(name).copy_(value)
    return False


def _set_bounds(layer: CalibratingMixin, wanted: torch.Tensor, energy: torch.Tensor) -> None:
    lower, upper = row_bounds(wanted, energy.expand_as(wanted), layer.layer_scheme.weight_bits)
    layer.weight_lower.copy_(lower)
    layer.weight_upper.copy_(upper)


def _rounded_whole(layer: CalibratingMixin, matrix: torch.Tensor, patches: Patches) -> torch.Tensor:
    """Sets weight bounds; returns (N, K) on their grid, errors of every column made up for by all that come after it."""
    hessian = patches.quantized.T @ patches.quantized
    ridge = RIDGE * hessian.diagonal().mean().clamp(min=1e-12)
    hessian.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    wanted = matrix
    if layer.layer_scheme.activation_bits <= COARSE or patches.shift is not None:
        products = matrix @ (patches.lost.T @ patches.quantized)
        if patches.shift is not None:
            products += patches.shift.T @ patches.quantized
        wanted = matrix + products @ inverse
    _set_bounds(layer, wanted, hessian.diagonal())
    return _rounded(layer, wanted, inverse)


def _rounded_in_groups(layer: CalibratingMixin, matrix: torch.Tensor, patches: Patches) -> torch.Tensor:
    """The same for so many columns that the matrix of their products would take minutes and gigabytes: `GROUP` of them at a time,
    each group first moved so that its outputs make up for the errors of all groups before it.
    """
    inputs = patches.quantized
    energy = inputs.square().sum(0)
    ridge = RIDGE * energy.mean().clamp(min=1e-12)
    wanted = matrix
    if layer.layer_scheme.activation_bits <= COARSE or patches.shift is not None:
        between = inputs @ inputs.T  # the regression of `_rounded_whole`, solved among patches
        between.diagonal().add_(ridge)
        change = patches.lost @ matrix.T
        if patches.shift is not None:
            change += patches.shift
        wanted = matrix + torch.linalg.solve(between, change).T @ inputs
    _set_bounds(layer, wanted, energy + ridge)
    rounded, error = torch.empty_like(wanted), inputs.new_zeros(len(inputs), len(wanted))
    for columns in energy.argsort(descending=True).split(GROUP):
        part = inputs[:, columns]
        hessian = part.T @ part
        hessian.diagonal().add_(ridge)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        rounded[:, columns] = _rounded(layer, wanted[:, columns] - (error.T @ part) @ inverse, inverse)
        error += part @ (rounded[:, columns] - wanted[:, columns]).T
    return rounded


def _rounded(layer: CalibratingMixin, matrix: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """(N, K) on the layer's grid, GPTQ's way; columns in the order of their inputs' energy, the largest first."""
    bits = layer.layer_scheme.weight_bits
    symmetric = bits == 8
    scale, zero_point = affine_parameters(layer.weight_lower, layer.weight_upper, bits, symmetric=symmetric)
    smallest, largest = code_range(bits, symmetric=symmetric)
    low, high = smallest - zero_point, largest - zero_point
    order = inverse.diagonal().argsort()
    weight, chol = matrix[:, order].clone(), torch.linalg.cholesky(inverse[order][:, order], upper=True)
    result = torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        end = min(start + COLUMNS, weight.shape[1])
        errors = torch.empty(weight.shape[0], end - start, device=weight.device)
        for column in range(start, end):
            codes = (weight[:, column] / scale).round().clamp(low, high)
            result[:, column] = codes * scale
            error = (weight[:, column] - result[:, column]) / chol[column, column]
            weight[:, column + 1 : end] -= error[:, None] * chol[column, column + 1 : end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ chol[start:end, end:]
    return result[:, order.argsort()]
