"""The token grid: activations symmetric for each token, with a scale that the token itself gives; rotations before that.

    y[t, n] = d_t s_n sum_c q_w[n, c] q_x[t, c]

Weights have a scale for each output channel. Scales do not depend on c, so a layer is one integer product. LSGQuant's activations
(DRAQ, arXiv 2602.03182) also have a scale for each input channel, s_c = max_t |X_tc|, beside that of the token,
d_t = max_c |X_tc| / s_c, as FlashVSR_ptq reads the paper: `draq` simulates them. With s_c = 2^e_c, a power of two, the channel's
scale goes into the codes, which still fit into a byte, and the layer stays one product: `token_codes` with exponents.

Float32 throughout, rounding half to even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from qartsr_pipeline.arithmetic.affine import centred_codes

BYTE = 127  # the largest code that an integer product takes
SMALLEST = 1e-30  # a token whose values are all below counts as zeros
CodesOf = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, bool], torch.Tensor]


class Codes(NamedTuple):
    """Attributes:
    codes: int8, (rows, C): a row is a token, or an output channel.
    scales: float32, (rows,): codes times these are the values.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def values(self) -> torch.Tensor:
        """(rows, C) float32."""
        return self.codes.float() * self.scales[:, None]


def largest_code(bits: int) -> int:
    """7 for 4 bits: the grid is symmetric.

    Raises:
        ValueError: not 2 to 8 bits.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"the token grid has 2 to 8 bits, not {bits}.")
    return 2 ** (bits - 1) - 1


def token_scale(largest: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplier that takes values to codes, and scale that takes codes to values, from the largest magnitude of each token.

    Both are not finite where the token is not: so are then its outputs.
    """
    largest = largest.clamp_min(SMALLEST)
    return most / largest, largest / most


def largest_exponent(bits: int) -> int:
    """The largest power of two that codes can be multiplied with and still fit into a byte: 4 for 4 bits, 2 for 6, 0 for 8."""
    return (BYTE // largest_code(bits)).bit_length() - 1


def channel_exponents(maxima: torch.Tensor, bits: int) -> torch.Tensor:
    """Exponents e_c from the largest magnitude of every input channel over calibration data.

    The largest channels get `largest_exponent`, each of half their size one less, and everything below 0.

    Args:
        maxima: (C,), not negative.

    Returns:
        int8 (C,).
    """
    most = largest_exponent(bits)
    relative = torch.log2(maxima.float() / maxima.max().clamp_min(torch.finfo(torch.float32).tiny))
    return (relative.round() + most).clamp(0, most).to(torch.int8)


def centred_token_codes(
    values: torch.Tensor, bits: int, exponents: torch.Tensor | None = None, codes_of: CodesOf = centred_codes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantizes tokens; differentiable (straight-through). Codes times scales are the values.

    With l_t = max_c |x_tc| / 2^e_c and m the largest code: q_tc = rint(x_tc / 2^e_c (m / l_t)), the code is q_tc 2^e_c, and the
    scale d_t = l_t / m. A token's result depends on no other one. NaN and infinity give the code 0 or NaN, and their token
    a scale that is not finite.

    Args:
        values: float32 (..., C).
        exponents: (C,) from `channel_exponents`; None for zeros.
        codes_of: `affine.centred_codes`, or a function with the same values and other gradients.

    Returns:
        Integers in a float32 tensor (..., C), and scales (..., 1).
    """
    powers = None if exponents is None else torch.exp2(exponents.float())
    scaled = values if powers is None else values / powers
    multiplier, scales = token_scale(scaled.abs().amax(-1, keepdim=True), largest_code(bits))
    codes = codes_of(scaled, multiplier, torch.zeros_like(scales), bits, True)
    return codes if powers is None else codes * powers, scales


def token_codes(x: torch.Tensor, bits: int, exponents: torch.Tensor | None = None) -> Codes:
    """The same in bytes, without gradient, for rows (rows, C) of any float type; NaN is the code 0."""
    codes, scales = centred_token_codes(x.float(), bits, exponents)
    return Codes(codes.nan_to_num(nan=0.0).to(torch.int8), scales[:, 0])


def draq(x: torch.Tensor, bits: int) -> torch.Tensor:
    """DRAQ, simulated: (rows, C) -> its quantized values in float32. A channel's scale depends on all rows that come together."""
    most, x = largest_code(bits), x.float()
    channels = x.abs().amax(0)
    channels = torch.where(channels > 0, channels, 1.0)
    scaled = x / channels
    scales = token_scale(scaled.abs().amax(1), most)[1][:, None]
    return (scaled / scales).round().clamp(-most, most) * scales * channels


def product(x: Codes, weight: Codes) -> torch.Tensor:
    """y (tokens, outputs) float32: the integer product, exact in 32 bits, then both scales."""
    sums = x.codes.to(torch.int32) @ weight.codes.to(torch.int32).T
    return sums.float() * x.scales[:, None] * weight.scales


def rotation_size(channels: int, most: int = 256) -> int:
    """The largest power of two up to ``most`` that divides the channels: the blocks that `rotated` turns. 0 if that is 1."""
    size = min(most, channels & -channels)
    return size if size > 1 else 0


def rotated(x: torch.Tensor, size: int) -> torch.Tensor:
    """x H, H block-diagonal of normalized Hadamard matrices: (..., C) -> (..., C), which spreads outliers over a block.

    H is symmetric and its own inverse, so that a layer with rotated weights and activations is the layer, (x H) (W H)^T = x W^T.
    Float32; additions in one order, so that results are the same bit for bit wherever they are computed. Differentiable.

    Args:
        size: of the blocks, a power of two that divides C.

    Raises:
        ValueError: it does not.
    """
    if size < 1 or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(f"the rotation's size must be a power of two that divides {x.shape[-1]} channels, but is {size}.")
    return _Rotation.apply(x.float(), size)


class _Rotation(torch.autograd.Function):
    """H is symmetric, so the gradient is rotated in the same way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int) -> torch.Tensor:
        ctx.size = size
        return _rotated(x, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _rotated(gradient, ctx.size), None


def _rotated(x: torch.Tensor, size: int) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    return rotate_(x, size, x.new_empty(2 * x.numel()))


def rotate_(x: torch.Tensor, size: int, scratch: torch.Tensor) -> torch.Tensor:
    """`rotated` in place, for contiguous float32 (..., C) without gradient.

    Sums and differences of numbers 1, 2, 4, .. apart. Numbers of one place in their blocks lie together meanwhile, in rows:
    neighbours within a block would be added one by one.

    Args:
        scratch: float32, at least twice as many numbers as x has; large ones are slow to allocate.
    """
    blocks, count = x.view(-1, size), x.numel()
    rows, other = (part.view(size, -1) for part in scratch.view(-1)[: 2 * count].split(count))
    rows.copy_(blocks.t())  # PyTorch transposes two dimensions fast, more of them slowly
    step = 1
    while step < size:
        (first, second), (above, below) = (t.view(size // (2 * step), 2, -1).unbind(1) for t in (rows, other))
        torch.add(first, second, out=above)
        torch.sub(first, second, out=below)
        rows, other, step = other, rows, 2 * step
    blocks.copy_(rows.mul_(size**-0.5).t())
    return x
