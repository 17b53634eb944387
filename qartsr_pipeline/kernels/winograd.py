"""The backend `winograd`: integer convolutions of 3 x 3 with 16 products in the place of 36, for x86 processors without VNNI.

There, a sum of two products of bytes is one of 16 bits, and saturates at W8A8. Tiles of codes and weights that Winograd's
algorithm transforms (`winograd_loops`) are integers of 12 bits at most; their products are summed in 32 bits by an
instruction that every x86 processor has. Sums are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from qartsr_pipeline.kernels import compiled
from qartsr_pipeline.kernels.backend import X86, Constraints
from qartsr_pipeline.kernels.codes import weight_bytes
from qartsr_pipeline.kernels.compiled import as_numpy
from qartsr_pipeline.kernels.cpu import BRANCH_OPERATORS, OnCPU, OneDNN, Ready, dtype_on_cpu, prepare_branch
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer

GAIN = 4  # outputs are so many times too large, see `winograd_loops`
WIDEST_OF_FEW_BITS = 320
LONGEST_SUM = 2**31 // (GAIN * 255 * 128)  # products of codes whose sum, so many times too large, is below 2^31


@cache
def _loops() -> Any:
    from qartsr_pipeline.kernels import winograd_loops

    return winograd_loops


@dataclass(frozen=True)
class Codes(Ready):
    """A layer's constants.

    Attributes:
        codes: int8 (N, 3, 3, C), as `weight_bytes` gives them.
        scale, bias: (N,) float32, of what `winograd_loops` computes.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor


def _make_codes(layer: StoredLayer, dtype: torch.dtype) -> Codes:
    return Codes(
        layer.smooth / layer.input_scale,
        int(layer.input_zero_point),
        prepare_branch(layer, dtype),
        weight_bytes(layer).permute(0, 2, 3, 1).contiguous(),
        (layer.weight_scale * layer.input_scale / GAIN).float(),
        torch.zeros(layer.spec.out_channels) if layer.bias is None else layer.bias.detach().float(),
    )


class Winograd(OnCPU[Codes]):
    """x86 processors, with numba; used where oneDNN cannot sum products of bytes in 32 bits.

    Memory: one byte a weight beside the stored ones, none at 8 bits, as `float` has; with `low_memory` none ever. Transformed
    weights take 3.6 bytes each, but only during a layer's own call.
    """

    name = "winograd"
    code_dtype = torch.uint8
    constraints = (
        Constraints(
            device="cpu",
            machines=X86,
            operators=BRANCH_OPERATORS,
            loops=True,
            kinds=("conv2d",),
            kernel_size=(3, 3),
            stride=(1, 1),
            channel_multiple=2,
            fewest_channels=16,
            longest_sum=LONGEST_SUM,
            grids=("tensor",),
        ),
    )

    def unavailable(self) -> str | None:
        reason = super().unavailable()
        if reason is None:
            try:
                _loops()
            except Exception as error:  # numba's ways of saying that it knows less than these loops need are many
                reason = f"numba cannot compile its loops: {error}"
        return reason

    def preferred_for(self, spec: LayerSpec) -> bool:
        """What `float` would compute otherwise, and, without VNNI, narrow layers of few bits: there it takes 0.7 of the time of
        oneDNN's bytes (64 channels, 128 x 128 pixels), and as long at 320 channels (32 x 32), but four times as long at 1280 (8 x
        8), where most of it is to transform the weights.
        """
        onednn = OneDNN()
        if not (onednn.unavailable() or onednn.unsupported(spec, "cpu")):
            widest = max(spec.in_channels, spec.out_channels)
            if widest > WIDEST_OF_FEW_BITS or all(one.has_vnni() for one in OneDNN.constraints):
                return False
        return not (self.unsupported(spec, "cpu") or self.unavailable())  # the last imports the loops

    def ready(self, layer: StoredLayer, dtype: torch.dtype, pixels: int | None = None) -> Codes:
        computed = dtype_on_cpu(dtype)
        return layer.prepared.get(layer, ("winograd", computed), lambda stored: _make_codes(stored, computed))

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        raise NotImplementedError  # see `constraints`

    def conv2d_product(self, codes: torch.Tensor, ready: Codes, layer: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
        x = codes.permute(0, 2, 3, 1).contiguous()
        batch, outputs, height, width = layer.spec.output_shape(codes.shape)
        y = torch.empty(batch, height, width, outputs)
        torch.ops.qartsr_cpu.winograd(x, ready.zero_point, ready.codes, ready.scale, ready.bias, layer.spec.padding, y)
        return y.permute(0, 3, 1, 2).to(dtype)


def _winograd(
    x: torch.Tensor,
    zero: int,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    padding: tuple[int, int],
    out: torch.Tensor,
) -> None:
    batch, height, width, channels = x.shape
    outputs, loops = out.shape[3], _loops()
    blocks, tile_rows, columns = -(-outputs // loops.OUTPUTS), (out.shape[1] + 1) // 2, 2 * ((out.shape[2] + 1) // 2) + 2
    weight = torch.empty(blocks, loops.POSITIONS, channels // 2, loops.OUTPUTS, 2, dtype=torch.int16).numpy()
    blank = torch.full((width * channels,), zero, dtype=torch.uint8).numpy()
    constants = (zero, weight, as_numpy(scale, -1), as_numpy(bias, -1), tuple(padding), blank)

    def transform(first: int, last: int) -> None:
        loops.transform_weights(as_numpy(codes, *codes.shape), first, last, weight)

    def part(first: int, last: int) -> None:
        lines = torch.zeros(4, columns * channels, dtype=torch.int16).numpy()
        tiles = torch.empty(loops.POSITIONS, loops.CHUNK, channels, dtype=torch.int16).numpy()
        products = torch.empty(loops.POSITIONS, loops.CHUNK, loops.OUTPUTS, dtype=torch.int32).numpy()
        for image, result in zip(as_numpy(x, batch, height, -1), as_numpy(out, *out.shape), strict=True):
            loops.convolve(image, *constants, first, last, lines, tiles, products, result)

    _in_threads(transform, blocks)
    _in_threads(part, tile_rows)


def _in_threads(part: Callable[[int, int], None], count: int) -> None:
    """`part(first, last)` for all numbers below `count`."""
    step = -(-count // torch.get_num_threads())
    if step == count:
        return part(0, count)
    starts = range(0, count, step)
    list(compiled.pool(torch.get_num_threads()).map(part, starts, (min(start + step, count) for start in starts)))


compiled.library.define(
    "winograd(Tensor x, int zero, Tensor codes, Tensor scale, Tensor bias, int[2] padding, Tensor(a!) out) -> ()"
)
compiled.library.impl("winograd", _winograd, "CPU")
