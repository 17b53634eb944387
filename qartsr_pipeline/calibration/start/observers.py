"""What a layer sees: samples of its input over calibration images, and bounds from them: extremes, percentiles, or the
shrunken extremes of least squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from qartsr_pipeline.arithmetic.affine import affine_parameters, code_range, fake_quantize

SHRINK = tuple(1 - 0.05 * i for i in range(15))  # of the extremes, 1.0 down to 0.3
OUTPUTS, WINDOWS = 8, 16  # side of a window's output, and windows of one call
PART = 1 << 19  # values that bounds are searched for together: with more, every pass would go to memory
MOST_VALUES = 2**20  # in the windows of one call: less of them where there are many channels
Batch = TypeVar("Batch")


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) of a convolution or (..., C) of a linear layer -> (positions, C)."""
    return (x.permute(0, 2, 3, 1) if x.dim() == 4 else x).reshape(-1, x.shape[1 if x.dim() == 4 else -1])


@dataclass
class InputSample:
    """Input of one layer.

    Attributes:
        vectors: list of (positions, C) float32: the input at random positions, all channels.
        windows: list of (n, C, side, side) of a convolution's input at random places; empty for other layers.
        lower, upper: (C,) extremes over everything that was seen.
        means: (C,) of everything in a batch, one for each batch.
    """

    vectors: list[torch.Tensor] = field(default_factory=list)
    windows: list[torch.Tensor] = field(default_factory=list)
    lower: torch.Tensor | None = None
    upper: torch.Tensor | None = None
    means: list[torch.Tensor] = field(default_factory=list)
    _sum: torch.Tensor | None = None
    _count: int = 0

    def add(self, x: torch.Tensor, positions: int, generator: torch.Generator) -> None:
        """Takes in (B, C, H, W) of a convolution or (..., C) of a linear layer."""
        rows = as_rows(x.detach().float())
        lower, upper = rows.amin(0), rows.amax(0)
        self.lower = lower if self.lower is None else torch.minimum(self.lower, lower)
        self.upper = upper if self.upper is None else torch.maximum(self.upper, upper)
        sums = rows.sum(0, dtype=torch.float64 if rows.device.type != "mps" else None)
        self._sum = sums if self._sum is None else self._sum + sums
        self._count += len(rows)
        chosen = torch.randperm(len(rows), generator=generator)[:positions]
        self.vectors.append(rows[chosen.to(rows.device)].clone())

    def end_batch(self) -> None:
        """Everything since the last call was of one batch."""
        if self._sum is not None:
            self.means.append((self._sum / self._count).float())
            self._sum, self._count = None, 0

    def add_windows(self, x: torch.Tensor, layer: nn.Conv2d, generator: torch.Generator) -> None:
        """Takes in windows of (B, C, H, W) in which the layer has up to `OUTPUTS` x `OUTPUTS` outputs; none of a smaller map."""
        sides = [(OUTPUTS - 1) * stride + kernel for stride, kernel in zip(layer.stride, layer.kernel_size, strict=True)]
        height, width = (min(side, size) for side, size in zip(sides, x.shape[2:], strict=True))
        if height < layer.kernel_size[0] or width < layer.kernel_size[1]:
            return
        count = max(1, min(WINDOWS, MOST_VALUES // (x.shape[1] * height * width)))
        places = torch.stack(
            [
                torch.randint(size, (count,), generator=generator)
                for size in (len(x), x.shape[2] - height + 1, x.shape[3] - width + 1)
            ],
            1,
        )
        cut = [x[image, :, top : top + height, left : left + width] for image, top, left in places.tolist()]
        self.windows.append(torch.stack(cut).detach().float())

    @property
    def together(self) -> torch.Tensor:
        """What shows the inputs of all taps together: windows (n, C, h, w) of a convolution, rows of other layers."""
        return torch.cat(self.windows) if self.windows else self.rows

    @property
    def extremes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`lower` and `upper` of a layer that something was seen of."""
        assert self.lower is not None and self.upper is not None
        return self.lower, self.upper

    @property
    def rows(self) -> torch.Tensor:
        """(positions, C) of all pictures."""
        return torch.cat(self.vectors)


def row_bounds(rows: torch.Tensor, importance: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of every row of a weight (N, K), (N,) each: its shrunken extremes of least squared error.

    Args:
        importance: (N, K), how much an error at each place weighs.
    """
    if rows.numel() > 2 * PART:
        count = max(1, PART // rows.shape[1])
        parts = [row_bounds(*each, bits) for each in zip(rows.split(count), importance.split(count), strict=True)]
        lower, upper = (torch.cat(bounds) for bounds in zip(*parts, strict=True))
        return lower, upper
    extremes = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    lower, upper = extremes[0].clone(), extremes[1].clone()
    least = torch.full_like(lower, float("inf"))
    for factor in SHRINK:
        low, high = extremes[0] * factor, extremes[1] * factor
        quantized = fake_quantize(rows, low[:, None], high[:, None], bits, symmetric=bits == 8)
        error = ((quantized - rows).square() * importance).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        lower[better], upper[better] = low[better], high[better]
    return lower, upper


@torch.no_grad()
def observe(
    layers: Mapping[str, nn.Module],
    run: Callable[[Batch], object],
    batches: Iterable[Batch],
    positions: int = 256,
    seed: int = 0,
    windows: bool = False,
) -> dict[str, InputSample]:
    """Runs ``run(batch)`` for every batch and samples the input of each of the layers.

    Args:
        layers: qualified name -> layer.
        positions: how many positions are kept per call and layer.
        windows: whether windows of the inputs of convolutions with several taps are kept, too.

    Raises:
        ValueError: if a layer is never called, or sees a value that is not finite; the message names it.
    """
    samples = {name: InputSample() for name in layers}
    generator, of_windows = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)

    def watch(name: str, module: nn.Module, x: torch.Tensor) -> None:
        samples[name].add(x, positions, generator)
        if windows and isinstance(module, nn.Conv2d) and module.weight[0, 0].numel() > 1:
            samples[name].add_windows(x, module, of_windows)

    def hook_for(name: str) -> Callable:
        return lambda module, inputs: watch(name, module, inputs[0])

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            run(batch)
            for sample in samples.values():
                sample.end_batch()
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
