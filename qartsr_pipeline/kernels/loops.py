"""The loops of `compiled`, in what of Python numba compiles. bfloat16 values come as the 16 bits that they are.

Rows hold one or several pixels, one after the other. What belongs to a channel has one value a channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}  # numpy's: division by 0 gives infinity
F = np.float32


@intrinsic
def widened(typing, value):
    """The float32 that a stored value is: bfloat16, as its bits, or float32."""

    def make(context, builder, signature, arguments):
        if signature.args[0] == types.float32:
            return arguments[0]
        wide = builder.zext(arguments[0], context.get_value_type(types.uint32))
        shifted = builder.shl(wide, context.get_constant(types.uint32, 16))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(value), make


@intrinsic
def narrowed(typing, value, like):
    """float32 -> `like`'s type: bits of the nearest bfloat16, ties to even, or float32."""

    def make(context, builder, signature, arguments):
        if signature.return_type == types.float32:
            return arguments[0]

        def constant(number: int):
            return context.get_constant(types.uint32, number)

        bits = builder.bitcast(arguments[0], context.get_value_type(types.uint32))
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(bits, builder.add(odd, constant(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, constant(16)), context.get_value_type(types.uint16))

    return like(types.float32, like), make


@intrinsic
def plus(typing, summand, factor, other):
    """factor x other + summand, rounded once: where the exact bits do not matter."""

    def make(context, builder, signature, arguments):
        return builder.fma(arguments[1], arguments[2], arguments[0])

    return types.float32(types.float32, types.float32, types.float32), make


@intrinsic
def power_of_two(typing, exponent):
    """int32 from -126 to 127 -> float32."""

    def make(context, builder, signature, arguments):
        biased = builder.add(arguments[0], context.get_constant(types.int32, 127))
        shifted = builder.shl(biased, context.get_constant(types.int32, 23))
        return builder.bitcast(shifted, context.get_value_type(types.float32))

    return types.float32(types.int32), make


@intrinsic
def stored(typing, code, offset, like):
    """A code, a float32 integer, plus the offset, as a byte (modulo 256); or as float32 without it."""

    def make(context, builder, signature, arguments):
        if signature.return_type == types.float32:
            return arguments[0]
        integer = builder.fptosi(arguments[0], context.get_value_type(types.int32))
        return builder.trunc(builder.add(integer, arguments[1]), context.get_value_type(types.uint8))

    return like(types.float32, types.int32, like), make


@njit(**OPTIONS)
def code(value, low, high):
    """clamp(rint(value)), ties to even; 0 of NaN."""
    rounded = np.rint(value)
    rounded = rounded if rounded == rounded else F(0)
    return min(max(rounded, low), high)


@njit(**OPTIONS)
def silu(x):
    """x / (1 + exp(-x)), with a relative error below 1e-6. exp(-x) = 2^n 2^f, f from -1/2 to 1/2, and 2^f has a short series."""
    t = min(max(x * F(-1.44269504), F(-126)), F(126))
    n = np.rint(t)
    f = t - n
    power = plus(F(1.3333558e-3), f, F(1.5403530e-4))
    power = plus(F(9.6181291e-3), f, power)
    power = plus(F(5.5504109e-2), f, power)
    power = plus(F(2.4022651e-1), f, power)
    power = plus(F(6.9314718e-1), f, power)
    power = plus(F(1), f, power)
    return x / plus(F(1), power, power_of_two(np.int32(n)))


@njit(**OPTIONS)
def repeated(values, length):
    """One value a channel -> for every value of a row."""
    row = np.empty(length, np.float32)
    for start in range(0, length, values.shape[0]):
        row[start : start + values.shape[0]] = values
    return row


@njit(**OPTIONS)
def quantize(x, multiplier, low, high, offset, codes):
    least, most, add = F(low), F(high), np.int32(offset)
    multiplier = repeated(multiplier, x.shape[1])
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            codes[i, j] = stored(code(widened(x[i, j]) * multiplier[j], least, most), add, codes[i, j])


@njit(**OPTIONS)
def normalize_and_quantize(x, scale, shift, multiplier, low, high, offset, codes, kept):
    """`kept` is without rows if its values are not wanted."""
    least, most, add = F(low), F(high), np.int32(offset)
    scale, shift, multiplier = repeated(scale, x.shape[1]), repeated(shift, x.shape[1]), repeated(multiplier, x.shape[1])
    for i in range(x.shape[0]):
        if kept.shape[0]:
            for j in range(x.shape[1]):
                y = silu(plus(shift[j], widened(x[i, j]), scale[j]))
                kept[i, j] = narrowed(y, kept[i, j])
                codes[i, j] = stored(code(y * multiplier[j], least, most), add, codes[i, j])
        else:
            for j in range(x.shape[1]):
                y = silu(plus(shift[j], widened(x[i, j]), scale[j]))
                codes[i, j] = stored(code(y * multiplier[j], least, most), add, codes[i, j])


@njit(**OPTIONS)
def sums(x, centre, block):
    """Sums over the rows of x - centre and of its square, float64 (2, columns); over so many rows in float32. With a centre
    nothing cancels.
    """
    total = np.zeros((2, x.shape[1]))
    first, second = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    for start in range(0, x.shape[0], block):
        first[:] = 0
        second[:] = 0
        for i in range(start, min(start + block, x.shape[0])):
            for j in range(x.shape[1]):
                d = widened(x[i, j]) - widened(centre[j])
                first[j] += d
                second[j] += d * d
        for j in range(x.shape[1]):
            total[0, j] += first[j]
            total[1, j] += second[j]
    return total


@njit(**OPTIONS)
def scale_shift(total, centre, rows, weight, bias, groups, eps, scale, shift):
    """A GroupNorm's factor and summand of each channel, from `sums` over so many rows."""
    channels = weight.shape[0]
    width, count = channels // groups, rows * centre.shape[0] / groups
    for group in range(groups):
        first, second = 0.0, 0.0
        for pixel in range(0, centre.shape[0], channels):
            for j in range(pixel + group * width, pixel + (group + 1) * width):
                c, s = np.float64(widened(centre[j])), total[0, j]
                first += s + rows * c
                second += total[1, j] + 2 * c * s + rows * c * c
        mean = first / count
        factor = 1 / np.sqrt(max(second / count - mean * mean, 0.0) + eps)
        for j in range(group * width, (group + 1) * width):
            scale[j] = weight[j] * factor
            shift[j] = bias[j] - mean * factor * weight[j]
