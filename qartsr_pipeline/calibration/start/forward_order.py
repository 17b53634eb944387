"""Weights rounded once more, layer after layer in running order, on what a layer sees behind layers that are quantized already.

A start that is set from full precision's inputs does not know the errors that reach a layer. Here one batch runs through the
network twice at once, as two halves: one in full precision, one quantized. When a layer is reached, its weight is rounded on
patches of the quantized half (`rounding.round_together`), and its output there is fitted to

    y_q + SHARE (y_fp - y_q),

y_fp and y_q being what the original weight makes of either half. The batch then runs on through the new weight. A share of 1, as
in GPTAQ (arXiv 2504.02692), lowers the error of nearly every layer's output and worsens the image: most of an error behind
2-bit inputs cannot be seen in them, and a fit that tries makes everything smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from qartsr_pipeline.calibration.start.branches import merges
from qartsr_pipeline.calibration.start.observers import OUTPUTS, as_rows
from qartsr_pipeline.calibration.start.rounding import round_together
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.progress import SILENT, Progress
from qartsr_pipeline.quantization.calibrating import CalibratingMixin

COUNT, SIDE = 16, 192  # images, and their side in pixels at most
SHARE = 0.25  # of what reaches a layer as an error that its weight makes up for
WINDOWS = 6  # of each image


def round_on_quantized_inputs(context: CalibrationContext, layers: dict[str, CalibratingMixin]) -> list[str]:
    """`round_in_forward_order` for the layers of the context's pipeline, on images of its own."""
    family, pipeline = context.family, context.pipeline
    rng = np.random.default_rng([context.seed, COUNT, SIDE])
    side = min(context.recipe.image_size, SIDE)
    batch = family.training_batch(context.patches, min(context.recipe.images, COUNT), side, context.degradation, rng)
    return round_in_forward_order(
        layers, lambda both: family.run(pipeline, both), batch.to(context.device), context.progress, context.seed
    )


@torch.no_grad()
def round_in_forward_order(
    layers: dict[str, CalibratingMixin],
    run: Callable[[torch.Tensor], object],
    batch: torch.Tensor,
    progress: Progress = SILENT,
    seed: int = 0,
) -> list[str]:
    """Rounds the weights of layers again that have fewer than 16 bits and something merged into them, and sets their biases.

    Args:
        layers: by name, set up; they quantize, and see the images of a batch independently of each other.
        run: runs the whole network on a batch.
        batch: (B, ...) images; they take the memory of 2 B.

    Returns:
        Names of the layers that changed: of the others, the output on patches that are held out was better before.
    """
    changed: list[str] = []
    waiting = {name for name, layer in layers.items() if merges(layer) and "weight_lower" in layer._parameters}
    total, generator = len(waiting), torch.Generator().manual_seed(seed)
    progress.preparing("round behind quantized layers", 0, total)

    def forward_of(name: str, layer: CalibratingMixin) -> Callable[[torch.Tensor], torch.Tensor]:
        own = layer.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if len(x) % (2 * len(batch)):
                raise ValueError(
                    f"{name} sees {len(x)} inputs where {2 * len(batch)} images run: set layer.rounding_inputs=full_precision"
                )
            full, quantized = x.chunk(2)
            layer.quantizing = False
            wanted = own(full)
            if name in waiting:
                waiting.remove(name)
                shift = SHARE * (wanted - own(quantized)).float()
                layer.quantizing = True
                patches = patches_with_outputs(layer, quantized.float(), shift, generator)
                if patches is not None and round_together(layer, *patches):
                    changed.append(name)
                progress.preparing("round behind quantized layers", total - len(waiting), total)
            layer.quantizing = True
            return torch.cat([wanted, own(quantized)])

        return forward

    try:
        for name, layer in layers.items():
            layer.forward = forward_of(name, layer)
        run(torch.cat([batch, batch]))
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
            layer.quantizing = True
            layer.forget()
    return changed


def patches_with_outputs(
    layer: nn.Module, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Random places of a layer's input, and the same places of a map of its output's shape.

    Args:
        x, y: (B, C, H, W) and (B, N, H', W') of a convolution, (..., C) and (..., N) of a linear layer.

    Returns:
        Windows (n, C, h, w) and (n, N, h', w') of a convolution with several taps, without its padding; (positions, C) and
        (positions, N) of other layers; None of a map that is smaller than the kernel.
    """
    if not isinstance(layer, nn.Conv2d) or layer.weight[0, 0].numel() == 1:
        rows, outputs = as_rows(x), as_rows(y)
        chosen = torch.randperm(len(rows), generator=generator)[: len(x) * WINDOWS * OUTPUTS**2].to(rows.device)
        return (rows[chosen], outputs[chosen]) if len(rows) == len(outputs) else None
    axes = [_Axis.of(layer, axis, x.shape[2 + axis]) for axis in (0, 1)]
    if min(axis.outputs for axis in axes) < 1:
        return None
    cut = []
    for image in range(len(x)):
        for _ in range(WINDOWS):
            (top, top_out), (left, left_out) = (axis.place(generator) for axis in axes)
            cut.append((x[image, :, top, left], y[image, :, top_out, left_out]))
    windows, wanted = zip(*cut, strict=True)
    return torch.stack(windows), torch.stack(wanted)


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a convolution: kernel, stride, first output whose taps all lie in the map, where they begin, and how
    many such outputs there are.
    """

    taps: int
    stride: int
    first: int
    begin: int
    outputs: int

    @classmethod
    def of(cls, layer: nn.Conv2d, axis: int, size: int) -> _Axis:
        taps, stride, padding = layer.kernel_size[axis], layer.stride[axis], int(layer.padding[axis])
        first = -(-padding // stride)
        begin = first * stride - padding
        return cls(taps, stride, first, begin, (size - begin - taps) // stride + 1)

    def place(self, generator: torch.Generator) -> tuple[slice, slice]:
        """A random place: of a window, and of its outputs."""
        side = min(OUTPUTS, self.outputs)
        at = int(torch.randint(self.outputs - side + 1, (1,), generator=generator))
        begin = self.begin + at * self.stride
        return slice(begin, begin + (side - 1) * self.stride + self.taps), slice(self.first + at, self.first + at + side)
