"""What a layer sees: samples of its input over calibration images, and bounds from them: extremes, percentiles, or the
shrunken extremes of least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from qartsr_pipeline.arithmetic.affine import affine_parameters, code_range

SHRINK = tuple(1 - 0.05 * i for i in range(15))  # of the extremes, 1.0 down to 0.3
Batch = TypeVar("Batch")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) of a convolution or (..., C) of a linear layer -> (positions, C)."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1, x.shape[1 if x.dim() == 4 else -1])


@dataclass
class InputSample:
    """Input of one layer.

    Attributes:
        vectors: list of (positions, C) float32: the input at random positions, all channels.
        lower, upper: (C,) extremes over everything that was seen.
    """

    vectors: list[torch.Tensor] = field(default_factory=list)
    lower: torch.Tensor | None = None
    upper: torch.Tensor | None = None

    def add(self, x: torch.Tensor, positions: int, generator: torch.Generator) -> None:
        """Takes in (B, C, H, W) of a convolution or (..., C) of a linear layer."""
        rows = as_rows(x.detach().float())
        lower, upper = rows.amin(0), rows.amax(0)
        self.lower = lower if self.lower is None else torch.minimum(self.lower, lower)
        self.upper = upper if self.upper is None else torch.maximum(self.upper, upper)
        chosen = torch.randperm(len(rows), generator=generator)[:positions]
        self.vectors.append(rows[chosen.to(rows.device)].clone())

    @property
    def extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`lower` and `upper` of a layer that something was seen of."""
        assert self.lower is not None and self.upper is not None
        return self.lower, self.upper

    @property
    def rows(self) -> torch.Tensor:
        """(positions, C) of all pictures."""
        return torch.cat(self.vectors)


@torch.no_grad()
def observe(
    layers: Mapping[str, nn.Module],
    run: Callable[[Batch], object],
    batches: Iterable[Batch],
    positions: int = 256,
    seed: int = 0,
) -> dict[str, InputSample]:
    """Runs ``run(batch)`` for every batch and samples the input of each of the layers.

    Args:
        layers: qualified name -> layer.
        positions: how many positions are kept per call and layer.

    Raises:
        ValueError: if a layer is never called, or sees a value that is not finite; the message names it.
    """
    samples = {name: InputSample() for name in layers}
    generator = torch.Generator().manual_seed(seed)

    def hook_for(name: str) -> Callable:
        return lambda module, inputs: samples[name].add(inputs[0], positions, generator)

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            run(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, sample in samples.items():
        if sample.lower is None:
            raise ValueError(f"no calibration picture reached the layer {name!r}; leave it out with an override")
        if not all(torch.isfinite(extreme).all() for extreme in sample.extremes):
            raise ValueError(f"the layer {name!r} sees values that are not finite; run the full-precision model in float32")
    return samples


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
