"""Bounds of a layer's input, from a sample of it: extremes, percentiles, or the shrunken extremes of least squared error."""

from __future__ import annotations

import torch

from qartsr_pipeline.arithmetic.affine import affine_parameters, code_range

SHRINK = tuple(1 - 0.05 * i for i in range(15))  # of the extremes, 1.0 down to 0.3


class SquaredErrors:
    """What quantizing a sample with any bounds costs: sum of w (Q(x) - x)^2.

    The sample is sorted once and summed up from below; a pair of bounds then costs a search for the edges between its codes
    instead of a pass over all values.

    Args:
        values: (positions, C).
        weights: (C,) of the channels.
        bits: of the quantizer.
    """

    def __init__(self, values: torch.Tensor, weights: torch.Tensor, bits: int):
        self.bits = bits
        if values.device.type == "mps":  # has no float64
            values, weights = values.cpu(), weights.cpu()
        ordered, order = values.flatten().double().sort()
        weight = weights.double().expand(values.shape).flatten()[order]
        self.values = ordered
        powers = torch.stack([weight, weight * ordered, weight * ordered.square()])
        self.sums = torch.cat([powers.new_zeros(3, 1), powers.cumsum(1)], dim=1)

    def __call__(self, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        """(K,) float64 for K pairs of bounds, (K,) each."""
        scale, zero_point = affine_parameters(lower.to(self.values.device), upper.to(self.values.device), self.bits)
        smallest, largest = code_range(self.bits)
        codes = torch.arange(smallest, largest + 1, device=scale.device) - zero_point[:, None].double()
        levels = codes * scale[:, None].double()
        edges = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.searchsorted(self.values, edges.flatten()).view_as(edges)
        first, last = torch.zeros_like(ends[:, :1]), torch.full_like(ends[:, :1], len(self.values))
        ends = torch.cat([first, ends, last], dim=1)
        w, wx, wxx = self.sums[:, ends].diff(dim=-1)
        return (wxx - 2 * levels * wx + levels.square() * w).sum(1)


def input_bounds(
    smoothed: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    importance: torch.Tensor,
    bits: int,
    kind: str,
    percentile: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of phi x, scalars; always lower <= 0 <= upper.

    Args:
        smoothed: (positions, C) sample of phi x.
        lower, upper: its extremes over everything seen, scalars.
        importance: (C,) how much an error in each channel weighs.
        kind: "minmax", "percentile" or "mse".
        percentile: for "percentile": the share of values inside the bounds, in percent.
    """
    lower, upper = lower.clamp(max=0), upper.clamp(min=0)
    if kind == "minmax":
        return lower, upper
    if kind == "percentile":
        inside = percentile / 100
        flat = smoothed.flatten()
        low = flat.kthvalue(max(1, round(flat.numel() * (1 - inside)))).values
        high = flat.kthvalue(max(1, round(flat.numel() * inside))).values
        return low.clamp(max=0), high.clamp(min=0)
    errors, shrink = SquaredErrors(smoothed, importance, bits), torch.tensor(SHRINK, device=lower.device)
    # both ends together, then each alone: the full grid costs five times as much
    both = shrink[errors(lower * shrink, upper * shrink).argmin()]
    low = shrink[errors(lower * shrink, (upper * both).expand_as(shrink)).argmin()]
    high = shrink[errors((lower * low).expand_as(shrink), upper * shrink).argmin()]
    return lower * low, upper * high
