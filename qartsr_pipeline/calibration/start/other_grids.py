"""Calibrating layers on other grids than the package's, for methods that are compared with it: in simulation only.

The package's grid is one scale and zero point per output channel for weights and one static pair for the input. `layer_kinds`
gives the classes that a recipe's layer asks for, put together from

- `LearnedStep`: one trained factor for both bounds (LSQ, arXiv 1902.08153). It has a deployed form.
- `ClippedFirst`: other gradients at the ends of the grid (LSQ as well). It has a deployed form.
- `Offset`: an offset per input channel, subtracted before quantization (PassionSR's LET, arXiv 2411.17106).
- `GroupedWeights`, `DynamicActivations`: scales of groups of channels (SVDQuant, arXiv 2411.05007), symmetric as there
  or affine.
- `Rotated`: inputs and weights rotated by a Hadamard matrix (QuaRot, arXiv 2404.00456).

All of them give exactly the original layer while `quantizing` is False, and none writes to the original weights.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.arithmetic.affine import code_range, round_straight_through
from qartsr_pipeline.arithmetic.group_grid import quantize_affine_groups, quantize_groups
from qartsr_pipeline.calibration.recipe_layers import Layer
from qartsr_pipeline.calibration.start.observers import SHRINK
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear, CalibratingMixin, Kinds
from qartsr_pipeline.quantization.scheme import LayerScheme
from qartsr_pipeline.quantization.token_layers import TokenLinear

if TYPE_CHECKING:  # the classes below are put before a calibrating layer, see `layer_kinds`
    from typing_extensions import Self  # a part of the standard library from Python 3.11 on

    _Layer = CalibratingMixin
else:
    _Layer = object

LOWEST_OF_SILU = -0.2785  # an input that never falls below is what SiLU or GELU gave (-0.2785 and -0.17 are their minima)


def _channel_axis(x: torch.Tensor) -> int:
    """1 for (B, C, H, W), the last one for (..., C)."""
    return 1 if x.dim() == 4 else x.dim() - 1


def _over_channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(C,) or () shaped to broadcast over x."""
    return values.view(-1, 1, 1) if x.dim() == 4 else values


class SimulationOnly(_Layer):
    """A layer without a deployed form: what freezing asks of it raises."""

    def weight_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """There are none that a deployed layer could hold.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{type(self).__name__} exists in simulation only, for comparison: this grid has no deployed form, so it cannot be"
            " frozen. Freeze a recipe with static activations, group_size 0, and neither offset nor rotation"
        )

    @property
    def qweight(self) -> torch.Tensor:
        """The residual weight after quantization, float32, the weight's shape."""
        if self.layer_scheme.weight_bits == 16:
            return super().qweight
        return self.quantized_weight(self.residual_weight())

    def quantized_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` after quantization with a scale and zero point a row, same shape."""
        scale, zero_point = (self._over_outputs(values) for values in super().weight_parameters())
        bits = self.layer_scheme.weight_bits
        return self.codes(weight, 1 / scale, zero_point, bits, symmetric=bits == 8) * scale


class LearnedStep(_Layer):
    """Parameters weight_log_step (N,) and input_log_step (), which start at 0: both bounds are multiplied by their exponential.

    The zero point does not move, since it is a ratio of the bounds.
    """

    weight_log_step: nn.Parameter
    input_log_step: nn.Parameter

    @classmethod
    def from_layer(cls, layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, adapter_rank: int = 0) -> Self:
        """See `CalibratingMixin.from_layer`."""
        new = super().from_layer(layer, scheme, adapter_rank)
        for name in ("weight", "input"):
            if f"{name}_lower" in new._parameters:
                new.register_parameter(f"{name}_log_step", nn.Parameter(torch.zeros_like(new.get_parameter(f"{name}_lower"))))
        return new

    def weight_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the weight, (N,) each."""
        scale, zero_point = super().weight_parameters()
        return scale * self.weight_log_step.exp(), zero_point

    def input_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of phi x, scalars."""
        scale, zero_point = super().input_parameters()
        return scale * self.input_log_step.exp(), zero_point


def codes_clipped_first(
    x: torch.Tensor, multiplier: torch.Tensor, zero_point: torch.Tensor, bits: int, symmetric: bool = False
) -> torch.Tensor:
    """The values of `centred_codes`, with the gradients of LSQ (arXiv 1902.08153, eq. 3): what lies beyond an extreme code is
    clipped, also within half a step of it, where `centred_codes` takes it to be inside."""
    smallest, largest = code_range(bits, symmetric)
    return round_straight_through(torch.clamp(x.float() * multiplier, smallest - zero_point, largest - zero_point))


class ClippedFirst(_Layer):
    """Layers whose values are clipped before they are rounded, which changes gradients only."""

    codes = staticmethod(codes_clipped_first)


class Shifted(_Layer):
    """Subtracts `input_offset`, (C,) or (), from the input before everything else, and adds to the output what that changes:

        y = [layer](x - o) + (W + F1 F2) o

    A convolution pads the input itself, with the zeros that the original has, before the subtraction: its border is exact.
    """

    input_offset: torch.Tensor
    stride: tuple[int, int]  # of a convolution, as the next three
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input's and output's shapes are the original layer's."""
        if not self.quantizing:
            return super().forward(x)
        if x.dim() == 4:
            height, width = self.padding
            x = F.pad(x, (width, width, height, height))
        shifted = x.float() - _over_channels(self.input_offset, x)
        return (super().forward(shifted) + _over_channels(self._of_offset(), x)).to(x.dtype)

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not self.quantizing:
            return super()._conv_forward(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, 0, self.dilation, self.groups)

    def _of_offset(self) -> torch.Tensor:
        """(N,): what the layer gives for the offset at every position."""
        weight = self.weight.float()
        if "adapter_up" in self._parameters:
            weight = weight + (self.adapter_up @ self.adapter_down).view_as(weight)
        by_channel = weight if weight.dim() == 2 else weight.sum((2, 3))
        return by_channel @ self.input_offset.expand(weight.shape[1])


class Offset(Shifted):
    """Parameter input_offset (C,), which starts at 0."""

    @classmethod
    def from_layer(cls, layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, adapter_rank: int = 0) -> Self:
        """See `CalibratingMixin.from_layer`."""
        new = super().from_layer(layer, scheme, adapter_rank)
        new.input_offset = nn.Parameter(torch.zeros_like(new.log_smooth))
        return new


class GroupedWeights(_Layer):
    """Weights with one scale per output channel, tap and `group_size` input channels, from their extremes.

    There are no weight bounds to train.
    """

    group_size: int
    affine: bool

    @classmethod
    def from_layer(cls, layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, adapter_rank: int = 0) -> Self:
        """See `CalibratingMixin.from_layer`."""
        new = super().from_layer(layer, scheme, adapter_rank)
        for name in ("weight_lower", "weight_upper", "weight_log_step"):
            new._parameters.pop(name, None)
        return new

    def set_weight_bounds_to_extremes(self) -> None:
        """Nothing to do: scales always come from the extremes."""

    def quantized_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` after quantization, same shape."""
        if self.affine:
            return quantize_affine_groups(weight, 1, self.group_size, self.layer_scheme.weight_bits, SHRINK)
        return quantize_groups(weight, 1, self.group_size, self.layer_scheme.weight_bits)


class DynamicActivations(Shifted):
    """Inputs with one scale per pixel or token and `group_size` channels, from their extremes at run time.

    As in SVDQuant's released program, inputs that are all but nonnegative because SiLU or GELU gave them are shifted by their
    minimum and quantized unsigned. Which ones these are is told here from a sample, there from the architecture: our reading.

    Affine ones are not shifted; their extremes are multiplied by input_shrink.

    Parameters that are not trained: input_offset (), input_unsigned () of 0 or 1, set by `set_input_range`; input_shrink (), set
    by `set_input_shrink`.
    """

    group_size: int
    affine: bool
    input_unsigned: nn.Parameter
    input_shrink: nn.Parameter

    @classmethod
    def from_layer(cls, layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, adapter_rank: int = 0) -> Self:
        """See `CalibratingMixin.from_layer`."""
        new = super().from_layer(layer, scheme, adapter_rank)
        for name in ("input_lower", "input_upper", "input_log_step"):
            new._parameters.pop(name, None)
        for name in ("input_offset", "input_unsigned"):
            new.register_parameter(name, nn.Parameter(torch.zeros((), device=layer.weight.device), requires_grad=False))
        if cls.affine:
            new.input_shrink = nn.Parameter(torch.ones((), device=layer.weight.device), requires_grad=False)
        return new

    @torch.no_grad()
    def set_input_shrink(self, smoothed: torch.Tensor) -> None:
        """Of affine activations: the factor of least squared error on a sample (positions, C) of phi x."""
        bits = self.layer_scheme.activation_bits
        if not self.affine or bits == 16:
            return
        tried = (quantize_affine_groups(smoothed, 1, self.group_size, bits, [factor]) for factor in SHRINK)
        errors = [float((quantized - smoothed).square().sum()) for quantized in tried]
        self.input_shrink.fill_(SHRINK[errors.index(min(errors))])

    @torch.no_grad()
    def set_input_range(self, lower: float) -> None:
        """Chooses signed or unsigned codes by the smallest value that a sample of the input has."""
        unsigned = lower >= LOWEST_OF_SILU and not self.affine
        self.input_unsigned.fill_(unsigned)
        self.input_offset.fill_(min(lower, 0.0) if unsigned else 0.0)

    def quantized_input(self, x: torch.Tensor, smooth: torch.Tensor | float) -> torch.Tensor:
        """phi x after quantization, float32, x's shape; ``smooth`` is phi shaped to broadcast over x."""
        bits = self.layer_scheme.activation_bits
        smoothed = x.float() * smooth
        if bits == 16:
            return smoothed
        if self.affine:
            return quantize_affine_groups(smoothed, _channel_axis(x), self.group_size, bits, [float(self.input_shrink)])
        return quantize_groups(smoothed, _channel_axis(x), self.group_size, bits, bool(self.input_unsigned))


@functools.cache
def hadamard(channels: int) -> torch.Tensor:
    """(C, C) float32, orthonormal and symmetric: Sylvester's Hadamard matrices on the diagonal, the largest that fit first.

    24 channels make blocks of 16 and 8.
    """
    if channels == 0:
        return torch.zeros(0, 0)
    block, size = torch.ones(1, 1), 1
    while 2 * size <= channels:
        block, size = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), block), 2 * size
    return torch.block_diag(block / size**0.5, hadamard(channels - size))


def _rotate(x: torch.Tensor, axis: int) -> torch.Tensor:
    matrix = hadamard(x.shape[axis]).to(x)
    return (x.movedim(axis, -1) @ matrix).movedim(-1, axis)


class Rotated(_Layer):
    """H (phi x) is quantized instead of phi x, and the residual weight times H^T instead of itself."""

    def transform_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `CalibratingMixin.transform_rows`."""
        return _rotate(rows, rows.dim() - 1)

    def residual_weight(self) -> torch.Tensor:
        """(W - L1 L2 + F1 F2) / phi H^T, what is quantized; float32, the weight's shape."""
        return _rotate(super().residual_weight(), 1)

    def quantized_input(self, x: torch.Tensor, smooth: torch.Tensor | float) -> torch.Tensor:
        """H (phi x) after quantization, float32; ``smooth`` is phi shaped to broadcast over x."""
        rotated = _rotate(x.float() * smooth, _channel_axis(x))
        return super().quantized_input(rotated, 1.0)  # type: ignore[arg-type]  # a scalar broadcasts as well


@functools.cache
def _kind(base: type[CalibratingMixin], parts: tuple[type, ...], group_size: int, affine: bool) -> type[CalibratingMixin]:
    name = "".join(part.__name__ for part in parts if part is not SimulationOnly) + base.__name__
    return type(name, (*parts, base), {"group_size": group_size, "affine": affine, "__module__": __name__})


def layer_kinds(layer: Layer, step: bool) -> Kinds:
    """Classes of the linear and the convolution layers, for `qartsr_pipeline.quantization.calibrating.prepare`.

    Args:
        layer: of the recipe.
        step: whether a stage trains the step size.

    Raises:
        ValueError: the step is to be trained, but neither weights nor inputs have static bounds.
    """
    if step and layer.group_size and layer.activations != "static":
        raise ValueError("a step size is trained, but with group_size and dynamic activations there are no bounds: leave out one")
    wanted = {
        Offset: layer.offset != "none",
        Rotated: layer.rotation == "hadamard" and layer.activations != "token",
        DynamicActivations: layer.activations == "dynamic",
        GroupedWeights: layer.group_size > 0,
        SimulationOnly: not layer.deployable,
        LearnedStep: step,
        ClippedFirst: layer.clip == "before_rounding",
    }  # in the order in which one calls the next
    parts = tuple(part for part, there in wanted.items() if there)
    linear = TokenLinear if layer.activations == "token" else CalibratingLinear
    if not parts:
        return linear, CalibratingConv2d
    grid = layer.group_size, layer.group_grid == "affine"
    return _kind(linear, parts, *grid), _kind(CalibratingConv2d, parts, *grid)
