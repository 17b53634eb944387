"""Plain post-training quantization: sets a calibrating layer's parameters from a sample of its input, without training.

In this order, each for one layer (or the layers that share an input) at a time

1. offset per input channel: the sample's mean, or the middle of its extremes;
2. smoothing phi_c = max|w_c|^(1 - a) / max|x_c|^a (SmoothQuant, arXiv 2211.10438, eq. 4, with phi = 1 / s), a from a small grid;
3. low-rank branch: the leading singular vectors of the smoothed weight (SVDQuant, arXiv 2411.05007, sec. 4.2); where rounds of
   refinement are asked for, then those of what quantization leaves of it, as long as the output's error falls;
4. weight bounds per output channel: extremes, or the shrunken extremes of least squared error;
5. input bounds: the same, or percentiles;
6. where that is asked for, the branch again: fitted to what quantization leaves of the layer's outputs (`branches`).

Layers on other grids (`other_grids`) leave out what they do not have, and rotated ones are measured as rotated.

The a that leaves the least error of the layer's output on the sample is kept; in large layers, whose branches take long to fit,
before they are fitted. For a k x k convolution the output error is summed over the taps, as if their inputs were independent:
positions are sampled, not neighbourhoods (our reading).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from qartsr_pipeline.calibration.recipe_layers import BOUNDS, OFFSETS, Layer
from qartsr_pipeline.calibration.start.branches import (
    LARGE,
    branch_from_weight,
    fit_branch,
    left_by_quantization,
    merges,
    unfolded,
)
from qartsr_pipeline.calibration.start.observers import InputSample, input_bounds, row_bounds
from qartsr_pipeline.calibration.start.other_grids import DynamicActivations, Rotated
from qartsr_pipeline.calibration.start.rounding import relative_patch_error, round_together
from qartsr_pipeline.calibration.training.losses import total
from qartsr_pipeline.calibration.training.progress import SILENT, Progress, follow
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.token_layers import TokenLinear

SEARCHED = (None, 0.25, 0.5, 0.75, 1.0)  # exponents a
SMALLEST_PHI = 1e-4  # of a channel that nobody reads, relative to the geometric mean of the others


@dataclass(frozen=True)
class Initialisation:
    """How parameters are set.

    Attributes:
        bounds: "minmax", "percentile" or "mse", of inputs. Weights have the extremes of each row, or with "mse" shrunken ones.
        percentile: for "percentile": the share of values inside the bounds, in percent.
        smoothing: exponents a that are tried, None among them for phi = 1 (next to 0 where nobody reads the channel); none at all
            to leave phi at 1 everywhere.
        branch_rounds: of refinement, at most.
        branch_fit: whether branches are fitted to the outputs (`branches.fit_branch`), where that lowers the error.
        rounding: "nearest", or "patches" for `rounding.round_together`, where that lowers the error.
        offset: "none" or "zero" to leave it alone, "mean" of the inputs, or "centre" of their extremes.
    """

    bounds: str = "mse"
    percentile: float = 99.9
    smoothing: tuple[float | None, ...] = SEARCHED
    offset: str = "none"
    branch_rounds: int = 0
    branch_fit: bool = False
    rounding: str = "nearest"

    def __post_init__(self):
        if self.bounds not in BOUNDS:
            raise ValueError(f"bounds is {self.bounds!r}, expected one of {BOUNDS}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}, expected more than 50 and at most 100")
        if self.offset not in OFFSETS:
            raise ValueError(f"offset is {self.offset!r}, expected one of {OFFSETS}")

    @classmethod
    def of(cls, layer: Layer) -> Initialisation:
        """What a recipe says of its layers."""
        smoothing = {"none": (), "ones": (None,), "search": SEARCHED}[layer.smoothing]
        return cls(layer.bounds, layer.percentile, smoothing, layer.offset, layer.branch_rounds, layer.branch_fit, layer.rounding)


def _has(layer: CalibratingMixin, parameter: str) -> bool:
    return parameter in layer._parameters


def smoothing_factor(x_largest: torch.Tensor, w_largest: torch.Tensor, exponent: float | None) -> torch.Tensor:
    """phi (C,), geometric mean 1 over the channels in use. A channel without weight gets next to none."""
    used = (w_largest > 0) & (x_largest > 0)
    phi = torch.ones_like(x_largest)
    if exponent is not None and used.any():
        phi[used] = w_largest[used] ** (1 - exponent) / x_largest[used] ** exponent
        phi[used] /= phi[used].log().mean().exp()
    phi[w_largest <= 0] = SMALLEST_PHI
    return phi.clamp(1e-4, 1e4)


@torch.no_grad()
def set_branch(layer: CalibratingMixin, rows: torch.Tensor, options: Initialisation) -> None:
    """Branch, and weight bounds around what it leaves, of a layer whose smoothing is set, for inputs (positions, C)."""
    branch_from_weight(layer)
    weight_bounds(layer, rows, options)


@torch.no_grad()
def weight_bounds(layer: CalibratingMixin, rows: torch.Tensor, options: Initialisation) -> None:
    """Weight bounds of a layer whose smoothing and branch are set, for inputs (positions, C)."""
    _weight_bounds(layer, layer.transform_rows(rows * layer.smooth).square().mean(0), options)


def _improve(layer: CalibratingMixin, rows: torch.Tensor, least: float, change: Callable[[], None]) -> float:
    """Makes a change to branch, adapter and weight bounds, and takes it back unless the output's error falls below ``least``;
    returns the lower of the two.
    """
    parts = [
        p for n, p in layer.named_parameters() if n.startswith(("branch_", "adapter_", "weight_")) and not n.endswith("step")
    ]
    before = [part.clone() for part in parts]
    change()
    error = _output_error(layer, rows)
    if error < least:
        return error
    for part, value in zip(parts, before, strict=True):
        part.copy_(value)
    return least


def _refine_branch(layer: CalibratingMixin, inputs: _Inputs, options: Initialisation) -> float:
    """Branch and quantized weight in turns, each from what the other leaves of the weight, as in SVDQuant's released program;
    returns the squared error of the output.
    """
    energy = layer.transform_rows(inputs.rows * layer.smooth).square().mean(0)

    def again() -> None:
        branch_from_weight(layer, layer.transform_rows(layer.qweight))
        _weight_bounds(layer, energy, options)

    least = _output_error(layer, inputs.rows)
    for _ in range(options.branch_rounds if layer.has_branch else 0):
        error = _improve(layer, inputs.rows, least, again)
        if error == least:
            break
        least = error
    return least


def _weight_bounds(layer: CalibratingMixin, energy: torch.Tensor, options: Initialisation) -> None:
    """Per output channel; ``energy`` (C,) is the mean square of what the weight meets, which weighs the error."""
    layer.set_weight_bounds_to_extremes()
    bits = layer.layer_scheme.weight_bits
    if not _has(layer, "weight_lower") or options.bounds != "mse":
        return
    weight = layer.residual_weight()
    importance = energy.view(1, -1, *[1] * (weight.dim() - 2)).expand_as(weight).flatten(1)
    lower, upper = row_bounds(weight.flatten(1), importance, bits)
    layer.weight_lower.copy_(lower)
    layer.weight_upper.copy_(upper)


@dataclass(frozen=True)
class _Inputs:
    """What layers that share an input are set from, less the offset: rows (positions, C), and extremes (C,) of all seen."""

    rows: torch.Tensor
    lower: torch.Tensor
    upper: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        return torch.maximum(-self.lower, self.upper)


def _set_offset(layers: list[CalibratingMixin], sample: InputSample, options: Initialisation) -> _Inputs:
    """Sets the offset of layers that have one; returns the inputs without it."""
    rows, (lower, upper) = sample.rows, sample.extremes
    for layer in layers:
        if isinstance(layer, DynamicActivations):
            layer.set_input_range(float(lower.min()))
        elif _has(layer, "input_offset") and options.offset in ("mean", "centre"):
            layer.get_parameter("input_offset").copy_(rows.mean(0) if options.offset == "mean" else (lower + upper) / 2)
    offset = getattr(layers[0], "input_offset", None)
    if offset is None:
        return _Inputs(rows, lower, upper)
    if any(getattr(layer, "padding", None) not in (None, (0, 0)) for layer in layers):  # it sees zeros as well
        lower, upper = lower.clamp(max=0), upper.clamp(min=0)
    return _Inputs(rows - offset, lower - offset, upper - offset)


def _set_input_bounds(layers: list[CalibratingMixin], inputs: _Inputs, seen: torch.Tensor, options: Initialisation) -> None:
    """``seen`` (positions, C) are the rows as the quantizer sees them: smoothed, and rotated where that is wanted."""
    first = layers[0]
    importance = total([unfolded(layer.residual_weight()).square().sum(0) for layer in layers])
    read = importance > 0  # bounds need not hold channels that nobody reads
    if isinstance(first, Rotated):
        ends = torch.stack([seen.amin(0), seen.amax(0)])
    else:
        ends = torch.stack([inputs.lower, inputs.upper]) * first.smooth
    ends = ends[:, read] if read.any() else torch.zeros(2, 1)
    bits = first.layer_scheme.activation_bits
    lower, upper = input_bounds(seen[:, read], ends.min(), ends.max(), importance[read], bits, options.bounds, options.percentile)
    first.input_lower.copy_(lower)
    first.input_upper.copy_(upper)


@torch.no_grad()
def set_input_bounds(layers: list[CalibratingMixin], sample: InputSample, options: Initialisation) -> None:
    """Bounds of the input that these layers share; their smoothing is set, and they have no offset."""
    rows = sample.rows
    seen = layers[0].transform_rows(rows * layers[0].smooth)
    _set_input_bounds(layers, _Inputs(rows, *sample.extremes), seen, options)


def _set_for(layers: list[CalibratingMixin], inputs: _Inputs, phi: torch.Tensor, options: Initialisation) -> float:
    """Sets everything for one phi; returns the squared error of the outputs on the sample."""
    first = layers[0]
    first.log_smooth.copy_(phi.log())
    smoothed = inputs.rows * first.smooth
    for layer in layers:
        if isinstance(layer, TokenLinear):
            layer.set_exponents(inputs.rows)
    seen = first.transform_rows(smoothed)
    energy = seen.square().mean(0)
    for layer in layers:
        if isinstance(layer, DynamicActivations):
            layer.set_input_shrink(seen)
        if options.branch_fit and _has(layer, "adapter_up"):
            layer.adapter_up.zero_()  # of another phi
        if _has(layer, "weight_change"):
            layer.get_parameter("weight_change").zero_()
        branch_from_weight(layer)
        _weight_bounds(layer, energy, options)
    if _has(first, "input_lower"):
        _set_input_bounds(layers, inputs, seen, options)
    errors = [_output_error(layer, inputs.rows) for layer in layers]
    if not options.branch_fit:
        return sum(errors)
    fits = (partial(fit_branch, layer, inputs.rows) for layer in layers)
    return sum(
        _improve(layer, inputs.rows, error, fit) if layer.has_branch else error
        for layer, error, fit in zip(layers, errors, fits, strict=True)
    )


@torch.no_grad()
def squared_errors(layer: CalibratingMixin, rows: torch.Tensor) -> torch.Tensor:
    """(N,) squared error of each output channel, summed over inputs (positions, C) from which the offset is taken already."""
    error = left_by_quantization(layer, rows)
    if layer.has_branch:
        up, down = layer.stored_branch()
        error = error - (rows * layer.smooth @ down.T) @ unfolded(up).T
    if layer.bias is not None:
        taps = error.shape[1] // len(layer.bias_change)
        error = error - (layer.bias_change / taps).repeat_interleave(taps)
    return error.square().sum(0).view(layer.weight.shape[0], -1).sum(1)


def _output_error(layer: CalibratingMixin, rows: torch.Tensor) -> float:
    return float(squared_errors(layer, rows).sum())


def _output_power(layer: CalibratingMixin, rows: torch.Tensor) -> float:
    return float((rows @ unfolded(layer.weight.float()).T).square().sum())


@torch.no_grad()
def relative_output_error(layer: CalibratingMixin, sample: InputSample) -> float:
    """|y_q - y|^2 / |y|^2 of the layer's output, without bias, on a sample of its input; of all taps together where it has
    windows, as if their inputs were independent where not.
    """
    rows = sample.rows
    if sample.windows:
        return relative_patch_error(layer, sample.together)
    offset = getattr(layer, "input_offset", None)
    error = _output_error(layer, rows if offset is None else rows - offset)
    return error / max(_output_power(layer, rows), 1e-12)


@torch.no_grad()
def initialise(
    layers: dict[str, CalibratingMixin],
    samples: dict[str, InputSample],
    options: Initialisation,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Sets the parameters of all layers; layers that share their input parameters are set together.

    Returns:
        Layer name -> relative error of its output on the sample, |y_q - y|^2 / |y|^2 (of all layers that share its input).
    """
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.log_smooth), []).append(name)
    errors = {}
    for names in follow(progress, groups.values(), "set layers"):
        group, sample = [layers[name] for name in names], samples[names[0]]
        inputs = _set_offset(group, sample, options)
        w_largest = torch.stack([unfolded(layer.weight.float()).abs().amax(0) for layer in group]).amax(0)
        candidates = [smoothing_factor(inputs.largest, w_largest, exponent) for exponent in options.smoothing]
        candidates = candidates or [torch.ones_like(w_largest)]
        large = options.branch_fit and any(layer.weight.numel() >= LARGE for layer in group)
        tried = replace(options, branch_fit=False) if large else options  # fits take most of the time
        scores = [_set_for(group, inputs, phi, tried) for phi in candidates]
        best = min(range(len(scores)), key=scores.__getitem__)
        again = large or best < len(scores) - 1
        error = _set_for(group, inputs, candidates[best], options) if again else scores[best]
        if options.branch_rounds:
            error = sum(_refine_branch(layer, inputs, options) for layer in group)
        if options.rounding == "patches":
            for name, layer in zip(names, group, strict=True):
                seen = samples[name].together
                shows_patches = (
                    seen.dim() == layer.weight.dim() or layer.weight[0, 0].numel() == 1
                )  # not of a map below its kernel
                if shows_patches and _has(layer, "weight_lower") and merges(layer):
                    round_together(layer, seen)
                errors[name] = relative_output_error(layer, samples[name])
        else:
            power = sum(_output_power(layer, sample.rows) for layer in group)
            errors.update(dict.fromkeys(names, error / max(power, 1e-12)))
        for layer in group:
            layer.forget()
    return errors
