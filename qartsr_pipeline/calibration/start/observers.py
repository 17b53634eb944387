"""What a layer sees: samples of every layer's input over calibration pictures, taken from the full-precision model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

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
    def rows(self) -> torch.Tensor:
        """(positions, C) of all pictures."""
        return torch.cat(self.vectors)


@torch.no_grad()
def observe(
    layers: dict[str, nn.Module],
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
        if not (torch.isfinite(sample.lower).all() and torch.isfinite(sample.upper).all()):
            raise ValueError(f"the layer {name!r} sees values that are not finite; run the full-precision model in float32")
    return samples
