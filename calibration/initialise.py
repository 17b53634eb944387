"""Plain post-training quantization: sets a calibrating layer's parameters from a sample of its input, without training.

In this order, each for one layer (or the layers that share an input) at a time

1. smoothing phi_c = max|w_c|^(1 - a) / max|x_c|^a (SmoothQuant, arXiv 2211.10438, eq. 4, with phi = 1 / s), a from a small grid;
2. low-rank branch: the leading singular vectors of the smoothed weight (SVDQuant, arXiv 2411.05007, sec. 4.2);
3. weight bounds per output channel: extremes, or the shrunken extremes of least squared error;
4. input bounds: the same, or percentiles.

The a that leaves the least error of the layer's output on the sample is kept. For a k x k convolution the output error is summed
over the taps, as if their inputs were independent: positions are sampled, not neighbourhoods (our reading).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.observers import InputSample
from qartsr_pipeline.arithmetic.affine import fake_quantize
from qartsr_pipeline.quantization.calibrating import CalibratingMixin

BOUNDS = ("minmax", "percentile", "mse")
SHRINK = tuple(1 - 0.05 * i for i in range(15))  # of the extremes, 1.0 down to 0.3
SMALLEST_PHI = 1e-4  # of a channel that nobody reads, relative to the geometric mean of the others


@dataclass(frozen=True)
class Initialisation:
    """How parameters are set.

    Attributes:
        bounds: "minmax", "percentile" or "mse", of inputs. Weights have the extremes of each row, or with "mse" shrunken ones.
        percentile: for "percentile": the share of values inside the bounds, in percent.
        smoothing: exponents a that are tried; (None,) for no smoothing.
    """

    bounds: str = "mse"
    percentile: float = 99.9
    smoothing: tuple[float | None, ...] = (None, 0.25, 0.5, 0.75)

    def __post_init__(self):
        if self.bounds not in BOUNDS:
            raise ValueError(f"bounds is {self.bounds!r}, expected one of {BOUNDS}")
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile is {self.percentile!r}, expected more than 50 and at most 100")


def _unfolded(weight: torch.Tensor) -> torch.Tensor:
    """(N, C, kh, kw) or (N, C) -> (N * taps, C)."""
    return weight.movedim(1, -1).reshape(-1, weight.shape[1])


def smoothing_factor(x_largest: torch.Tensor, w_largest: torch.Tensor, exponent: float | None) -> torch.Tensor:
    """phi (C,), geometric mean 1 over the channels in use. A channel without weight gets next to none."""
    used = (w_largest > 0) & (x_largest > 0)
    phi = torch.ones_like(x_largest)
    if exponent is not None and used.any():
        phi[used] = w_largest[used] ** (1 - exponent) / x_largest[used] ** exponent
        phi[used] /= phi[used].log().mean().exp()
    phi[w_largest <= 0] = SMALLEST_PHI
    return phi.clamp(1e-4, 1e4)


def _set_branch(layer: CalibratingMixin) -> None:
    if not layer.has_branch:
        return
    phi = layer.smooth
    smoothed = _unfolded(layer.weight.float()) / phi
    u, s, vh = torch.linalg.svd(smoothed, full_matrices=False)
    rank = layer.branch_down.shape[0]
    root = s[:rank].sqrt()
    up = (u[:, :rank] * root).view(layer.weight.shape[0], *layer.weight.shape[2:], rank)
    layer.branch_up.copy_(up.movedim(-1, 1))
    layer.branch_down.copy_(vh[:rank] * root[:, None] * phi)


def _weight_bounds(layer: CalibratingMixin, energy: torch.Tensor, options: Initialisation) -> None:
    """Per output channel; ``energy`` (C,) is the mean square of the smoothed input, which weighs the error."""
    layer.set_weight_bounds_to_extremes()
    bits = layer.layer_scheme.weight_bits
    if bits == 16 or options.bounds != "mse":
        return
    weight = layer.residual_weight()
    rows = weight.flatten(1)
    importance = energy.view(1, -1, *[1] * (weight.dim() - 2)).expand_as(weight).flatten(1)
    lower, upper = layer.weight_lower.clone(), layer.weight_upper.clone()
    least = torch.full_like(lower, float("inf"))
    for factor in SHRINK:
        quantized = fake_quantize(rows, (lower * factor)[:, None], (upper * factor)[:, None], bits, symmetric=bits == 8)
        error = ((quantized - rows).square() * importance).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        layer.weight_lower[better], layer.weight_upper[better] = lower[better] * factor, upper[better] * factor


def input_bounds(
    smoothed: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor, importance: torch.Tensor, bits: int, options: Initialisation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of phi x, scalars; always lower <= 0 <= upper.

    Args:
        smoothed: (positions, C) sample of phi x.
        lower, upper: its extremes over everything seen, scalars.
        importance: (C,) how much an error in each channel weighs.
    """
    zero = torch.zeros(())
    lower, upper = torch.minimum(lower, zero), torch.maximum(upper, zero)
    if options.bounds == "minmax":
        return lower, upper
    if options.bounds == "percentile":
        inside = options.percentile / 100
        flat = smoothed.flatten()
        low = flat.kthvalue(max(1, round(flat.numel() * (1 - inside)))).values
        high = flat.kthvalue(max(1, round(flat.numel() * inside))).values
        return torch.minimum(low, zero), torch.maximum(high, zero)
    # both ends together, then each alone: the full grid costs five times as much
    factors = (1.0, 1.0)
    for candidates in (
        lambda _: [(f, f) for f in SHRINK],
        lambda b: [(f, b[1]) for f in SHRINK],
        lambda b: [(b[0], f) for f in SHRINK],
    ):
        factors = min(
            candidates(factors),
            key=lambda f: float(
                ((fake_quantize(smoothed, lower * f[0], upper * f[1], bits) - smoothed).square() * importance).sum()
            ),
        )
    return lower * factors[0], upper * factors[1]


def _set_for(
    layers: list[CalibratingMixin], sample: InputSample, rows: torch.Tensor, phi: torch.Tensor, options: Initialisation
) -> float:
    """Sets everything for one phi; returns the squared error of the outputs on the sample."""
    first = layers[0]
    first.log_smooth.copy_(phi.log())
    phi = first.smooth
    smoothed = rows * phi
    energy = smoothed.square().mean(0)
    for layer in layers:
        _set_branch(layer)
        _weight_bounds(layer, energy, options)
    if first.layer_scheme.activation_bits < 16:
        importance = sum(_unfolded(layer.residual_weight()).square().sum(0) for layer in layers)
        read = importance > 0  # bounds need not hold channels that nobody reads
        ends = torch.stack([sample.lower * phi, sample.upper * phi])[:, read] if read.any() else torch.zeros(2, 1)
        bounds = input_bounds(
            smoothed[:, read], ends.min(), ends.max(), importance[read], first.layer_scheme.activation_bits, options
        )
        first.input_lower.copy_(bounds[0])
        first.input_upper.copy_(bounds[1])
    return sum(_output_error(layer, rows) for layer in layers)


def _output_error(layer: CalibratingMixin, rows: torch.Tensor) -> float:
    wanted = rows @ _unfolded(layer.weight.float()).T
    got = layer.quantized_input(rows, layer.smooth) @ _unfolded(layer.qweight).T
    if layer.has_branch:
        up, down = layer.stored_branch()
        got = got + (rows * layer.smooth @ down.T) @ _unfolded(up).T
    return float((got - wanted).square().sum())


@torch.no_grad()
def initialise(layers: dict[str, CalibratingMixin], samples: dict[str, InputSample], options: Initialisation) -> dict[str, float]:
    """Sets the parameters of all layers; layers that share their input parameters are set together.

    Returns:
        Layer name -> relative error of its output on the sample, |y_q - y|^2 / |y|^2 (of all layers that share its input).
    """
    groups: dict[int, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(id(layer.log_smooth), []).append(name)
    errors = {}
    for names in groups.values():
        group, sample = [layers[name] for name in names], samples[names[0]]
        rows = sample.rows
        x_largest = torch.maximum(-sample.lower, sample.upper)
        w_largest = torch.stack([_unfolded(layer.weight.float()).abs().amax(0) for layer in group]).amax(0)
        candidates = [smoothing_factor(x_largest, w_largest, exponent) for exponent in options.smoothing]
        scores = [_set_for(group, sample, rows, phi, options) for phi in candidates]
        best = min(range(len(scores)), key=scores.__getitem__)
        error = scores[best] if best == len(scores) - 1 else _set_for(group, sample, rows, candidates[best], options)
        power = sum(float((rows @ _unfolded(layer.weight.float()).T).square().sum()) for layer in group)
        errors.update(dict.fromkeys(names, error / max(power, 1e-12)))
    return errors
