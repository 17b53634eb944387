"""`torch._int_mm`, the plain signed byte product that CPUs and NVIDIA GPUs both have: linear, pointwise, and k x k by im2col.

Codes of up to 6 bits are centred, so that the product is the result and padding is 0. 8-bit activations are shifted into the
signed byte, u = c + z - 128, which is put right afterwards: sum(w c) = sum(w u) + (128 - z) sum(w); padding is then z - 128. The
patches of a convolution (kh kw bytes for every input byte) are built for as many output rows at a time as fit `PATCH_BYTES`.

Memory: on CUDA weights stay packed, and are unpacked in every call, for that layer alone (what this costs was not measured). On a
CPU one byte per weight stands beside the stored ones, twice the stored bytes at 4 bits, unless `low_memory`. At 8 bits
the stored bytes are the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from qartsr_pipeline.kernels.backend import Backend, Constraints
from qartsr_pipeline.kernels.codes import Grid, quantize, weight_bytes
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.tokens import linear_of_tokens

STAYS_PACKED_ON = {"cuda"}
PATCH_BYTES = 1 << 24
FEWEST_ROWS = 32  # CUDA demands more than 16


@cache
def has_vnni() -> bool:
    """Whether the product sums in 32 bits. Where it is oneDNN's, without VNNI, two neighbouring products are added in 16 bits,
    saturating: 2 x 127 x 127 stays below 2^15, but oneDNN makes the signed left factor 127 unsigned by adding 128, and
    2 x 255 x 127 does not.
    """
    left = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(left, left.t().contiguous()) == 64 * 127 * 127).all())


@dataclass(frozen=True)
class Constants:
    """A layer's constants."""

    weight: torch.Tensor | None  # of `_matrix`, None where it stays packed
    multiplier: torch.Tensor | None  # (C,), None on the token grid
    scale: torch.Tensor  # (N,), of the integer product
    constant: torch.Tensor | None  # (N,) int32, to be added to the integer product
    zero_point: int
    offset: int  # what codes are stored with


def _matrix(layer: StoredLayer) -> torch.Tensor:
    """Centred weight codes, (K, N) int8, K in the order (kh, kw, C), as the patches have it."""
    weight = weight_bytes(layer)
    if layer.spec.kind == "conv2d":
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(layer.spec.out_channels, -1).t()


def _make(layer: StoredLayer) -> Constants:
    kept = layer.weight_packed.device.type not in STAYS_PACKED_ON
    if layer.spec.grid == "token":
        return Constants(_matrix(layer) if kept else None, None, layer.weight_scale, None, 0, 0)
    zero_point = int(layer.input_zero_point)
    offset = zero_point - 128 if layer.spec.activation_bits == 8 else 0
    weight = _matrix(layer) if kept or offset else None
    return Constants(
        weight if kept else None,
        layer.smooth / layer.input_scale,
        layer.input_scale * layer.weight_scale,
        -offset * weight.sum(0, dtype=torch.int32) if offset and weight is not None else None,
        zero_point,
        offset,
    )


def _constants(layer: StoredLayer) -> Constants:
    return layer.prepared.get(layer, "int_mm", _make)


class IntMM(Backend):
    """CPUs with fast byte products, and NVIDIA GPUs from Turing on."""

    name = "int_mm"
    constraints = (
        # CPU: sums of one product read memory that is not theirs (torch 2.13); a signed left factor needs VNNI for 8-bit weights
        Constraints(
            device="cpu",
            slow_without_vnni=True,
            shortest_sum=2,
            needs_vnni=frozenset((8, bits) for bits in (2, 3, 4, 6, 8)),
            has_vnni=has_vnni,
        ),
        Constraints(device="cuda", capability=(7, 5), channel_multiple=8),
    )

    def prepare(self, layer: StoredLayer, dtype: torch.dtype) -> None:
        _constants(layer)

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        ready = _constants(layer)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if layer.spec.grid == "token":
            weight = _weight(ready, layer)

            def add_branch(part: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return y.add_(_row_branch(part, layer))

            y = linear_of_tokens(
                rows, layer, lambda codes: _multiply(codes, weight) * ready.scale, add_branch if layer.spec.rank else None
            )
            return y.view(*x.shape[:-1], -1)
        y = _scaled(_multiply(_codes(rows, ready, layer.spec), _weight(ready, layer)), ready, layer)
        if layer.spec.rank:
            y += _row_branch(rows, layer)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """The result is channels-last."""
        spec, ready = layer.spec, _constants(layer)
        batch, channels, height, width = x.shape
        codes = _codes(x.permute(0, 2, 3, 1).reshape(-1, channels), ready, spec).view(batch, height, width, channels)
        *_, out_height, out_width = spec.output_shape(x.shape)
        y = _branch(x, layer) if spec.rank else x.new_empty((batch * out_height * out_width, spec.out_channels))
        weight, start = _weight(ready, layer), 0
        for patches in _patches(codes, spec, ready.offset, out_width):
            part = y[start : start + len(patches)]
            product = _scaled(_multiply(patches, weight), ready, layer)
            part.copy_(product.add_(part) if spec.rank else product)
            start += len(patches)
        return y.view(batch, out_height, out_width, -1).permute(0, 3, 1, 2)


def _row_branch(rows: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """A linear layer's 16-bit branch: (rows, C) -> (rows, N), in their dtype."""
    hidden = F.linear(rows * layer.smooth.to(rows.dtype), layer.branch_down.to(rows.dtype))
    return F.linear(hidden, layer.branch_up.to(rows.dtype))


def _branch(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """A convolution's 16-bit branch: (B, C, H, W) -> (B H' W', N), contiguous, in x's dtype."""
    hidden = F.conv2d(x * layer.smooth.to(x.dtype).view(-1, 1, 1), layer.branch_down.to(x.dtype)[:, :, None, None])
    y = F.conv2d(hidden, layer.branch_up.to(x.dtype), stride=layer.spec.stride, padding=layer.spec.padding)
    return y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])


def _weight(ready: Constants, layer: StoredLayer) -> torch.Tensor:
    return _matrix(layer) if ready.weight is None else ready.weight


def _codes(rows: torch.Tensor, ready: Constants, spec: LayerSpec) -> torch.Tensor:
    """Signed bytes, (rows, C)."""
    assert ready.multiplier is not None  # on the tensor grid
    low = -ready.zero_point
    grid = Grid(ready.multiplier, low, low + 2**spec.activation_bits - 1, ready.offset, torch.uint8)
    return quantize(rows, grid).view(torch.int8)


def _multiply(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(rows, K) int8 by (K, N) int8 -> (rows, N) int32, exact."""
    rows = len(codes)
    if codes.device.type == "cuda" and rows < FEWEST_ROWS:
        codes = F.pad(codes, (0, 0, 0, FEWEST_ROWS - rows))
    # Rows that overlap, as patches can where the result is one pixel wide, give wrong sums in PyTorch up to 2.11.
    return torch._int_mm(codes.contiguous(), weight)[:rows]


def _scaled(product: torch.Tensor, ready: Constants, layer: StoredLayer) -> torch.Tensor:
    if ready.constant is not None:
        product += ready.constant
    y = product * ready.scale
    return y if layer.bias is None else y.add_(layer.bias)


def _patches(codes: torch.Tensor, spec: LayerSpec, padding_code: int, out_width: int) -> Iterator[torch.Tensor]:
    """The input bytes under each output pixel, (pixels, kh kw C), in order, in pieces of at most about PATCH_BYTES.

    Args:
        codes: (B, H, W, C).
    """
    if spec.is_pointwise:
        yield codes.reshape(-1, spec.in_channels)
        return
    (vertical, horizontal), kernel = spec.padding, spec.kernel_size
    padded = F.pad(codes, (0, 0, horizontal, horizontal, vertical, vertical), value=padding_code)
    windows = padded.unfold(1, kernel[0], spec.stride[0]).unfold(2, kernel[1], spec.stride[1])  # (B, H', W', C, kh, kw)
    patch = spec.taps * spec.in_channels
    step = max(1, PATCH_BYTES // max(1, patch * out_width))
    for image in windows.permute(0, 1, 2, 4, 5, 3):  # (H', W', kh, kw, C), still a view of what was padded
        for start in range(0, len(image), step):
            yield image[start : start + step].reshape(-1, patch)
