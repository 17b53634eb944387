"""The loops of `compiled_clips`, in what of Python numba compiles; see `loops`. A row is a token, or a pixel.

Rotations are the sums and differences of `arithmetic.token_grid.rotate_`, of the same numbers in the same order, and so the same
bit for bit: those of neighbours up to 8 apart within a vector of 16 numbers, the others between vectors.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from qartsr_pipeline.arithmetic.token_grid import SMALLEST
from qartsr_pipeline.kernels.loops import OPTIONS, F, code, narrowed, plus, repeated, silu, stored, widened

LANES = 16
INDEX = np.uint64
WITHOUT_SIGN = np.int32(0x7FFFFFFF)
VECTOR = ir.VectorType(ir.FloatType(), LANES)


def _vector_at(context, builder, array_type, array, index):
    """Address of 16 numbers of a contiguous float32 array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), VECTOR.as_pointer())


@intrinsic
def turn_neighbours(typing, row, start):
    """Sums and differences of the 16 numbers from `start` on that are 1, 2, 4 and 8 apart, in place."""

    def make(context, builder, signature, arguments):
        address = _vector_at(context, builder, signature.args[0], *arguments)
        vector = builder.load(address, align=4)
        for step in (1, 2, 4, 8):
            mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [lane ^ step for lane in range(LANES)])
            signs = ir.Constant(VECTOR, [-1.0 if lane & step else 1.0 for lane in range(LANES)])
            other = builder.shuffle_vector(vector, vector, mask)
            vector = builder.fadd(other, builder.fmul(vector, signs))
        builder.store(vector, address, align=4)

    return types.void(row, types.intp), make


@intrinsic
def turn_vectors(typing, row, first, second):
    """Sums and differences of 16 numbers from `first` on and 16 others, in place."""

    def make(context, builder, signature, arguments):
        array, *indices = arguments
        one, other = (_vector_at(context, builder, signature.args[0], array, index) for index in indices)
        above, below = (builder.load(address, align=4) for address in (one, other))
        builder.store(builder.fadd(above, below), one, align=4)
        builder.store(builder.fsub(above, below), other, align=4)

    return types.void(row, types.intp, types.intp), make


@intrinsic
def bits_of(typing, value):
    """float32 -> the int32 of the same bits."""

    def make(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.int32))

    return types.int32(types.float32), make


@intrinsic
def float_of(typing, bits):
    """int32 -> the float32 of the same bits."""

    def make(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), make


@njit(**OPTIONS)
def rotate(row, start, end):
    """Sums and differences of a block of 16 2^n numbers of a contiguous row; not yet normalized."""
    for first in range(start, end, LANES):
        turn_neighbours(row, first)
    step = LANES
    while step < end - start:
        for above in range(start, end, 2 * step):
            for first in range(above, above + step, LANES):
                turn_vectors(row, first, first + step)
        step *= 2


@njit(**OPTIONS)
def quantize(x, smooth, size, inverse_powers, powers, most, codes, scales):
    """`compiled_clips.quantize_tokens`; without powers of two these are empty. Codes are the bytes of int8."""
    channels, factor, block = x.shape[1], F(1), x.shape[1]
    row = np.empty(channels, np.float32)
    if size:
        factor, block = F(size**-0.5), size
    low, high, none, smallest = F(-most), F(most), np.int32(0), F(SMALLEST)
    for i in range(x.shape[0]):
        for start in range(0, channels, block):
            for j in range(INDEX(start), INDEX(start + block)):  # one that may be negative keeps a loop from vector instructions
                row[j] = widened(x[i, j]) * smooth[j]
            if size:
                rotate(row, start, start + block)
        largest = np.int32(0)  # as bits, by which NaN is larger than all numbers
        if powers.shape[0]:
            for j in range(channels):
                row[j] = row[j] * factor * inverse_powers[j]
                largest = max(largest, bits_of(row[j]) & WITHOUT_SIGN)
        else:
            for j in range(channels):
                row[j] = row[j] * factor
                largest = max(largest, bits_of(row[j]) & WITHOUT_SIGN)
        scale = float_of(largest)
        scale = F(np.nan) if scale != scale else max(scale, smallest)
        multiplier = F(1) / scale * high
        scales[i] = scale / high
        if powers.shape[0]:
            for j in range(channels):
                codes[i, j] = stored(code(row[j] * multiplier, low, high) * powers[j], none, codes[i, j])
        else:
            for j in range(channels):
                codes[i, j] = stored(code(row[j] * multiplier, low, high), none, codes[i, j])


@njit(**OPTIONS)
def scale(y, scales, bias, out):
    """`compiled_clips.scale_tokens`; without a bias that is empty."""
    for i in range(y.shape[0]):
        factor = scales[i]
        if bias.shape[0]:
            for j in range(y.shape[1]):
                out[i, j] = narrowed(plus(bias[j], y[i, j], factor), out[i, j])
        else:
            for j in range(y.shape[1]):
                out[i, j] = narrowed(y[i, j] * factor, out[i, j])


@njit(fastmath={"reassoc"}, **OPTIONS)
def square_sum(row, start, end):
    """Of float32 numbers, in any order, as vector instructions add."""
    total = F(0)
    for j in range(start, end):
        total += row[j] * row[j]
    return total


@njit(**OPTIONS)
def place(row, pixels, multiplier, limits, codes, number, first, frame):
    """Codes of several pixels' values into the channels that this frame has in the maps of all frames that see it.

    Args:
        multiplier: (taps, row's length).
        codes: (frames, pixels, taps C).
        number: of the frame; frames before the first have negative numbers.
        first: the pixel that the row begins with.
        frame: scratch of the row's length, of the codes' dtype.
    """
    least, most, add = F(limits[0]), F(limits[1]), np.int32(limits[2])
    taps, channels = multiplier.shape[0], codes.shape[2] // multiplier.shape[0]
    for tap in range(taps):
        sees = number + taps - 1 - tap
        if 0 <= sees < codes.shape[0]:
            for j in range(row.shape[0]):
                frame[j] = stored(code(row[j] * multiplier[tap, j], least, most), add, frame[j])
            for pixel in range(pixels):
                start, begin = INDEX(pixel * channels), INDEX(tap * channels)
                for j in range(INDEX(channels)):
                    codes[sees, first + pixel, begin + j] = frame[start + j]


@njit(**OPTIONS)
def quantize_frames(x, before, weight, multiplier, low, high, offset, codes, last):
    """`compiled_clips.quantize_frames`; returns the sum of all squares."""
    frames, pixels, channels = x.shape
    taps, limits = codes.shape[2] // channels, (low, high, offset)
    block = max(1, 512 // channels)  # pixels that are worked on together
    length = block * channels
    weight = repeated(weight, length)
    factors = np.empty((taps, length), np.float32)
    for tap in range(taps):
        factors[tap] = repeated(multiplier[tap * channels : (tap + 1) * channels], length)
    row, frame, total = np.zeros(length, np.float32), np.empty(length, codes.dtype), 0.0
    for number in range(1 - taps, 0):
        index = before.shape[0] + number
        for first in range(0, pixels, block):
            count = min(block, pixels - first)
            for pixel in range(count):
                start = INDEX(pixel * channels)
                for j in range(INDEX(channels)):
                    row[start + j] = widened(before[index, first + pixel, j]) if index >= 0 else F(0)
            place(row, count, factors, limits, codes, number, first, frame)
    for number in range(frames):
        keep = number - (frames - last.shape[0])
        for first in range(0, pixels, block):
            count = min(block, pixels - first)
            for pixel in range(count):
                start, end = INDEX(pixel * channels), INDEX((pixel + 1) * channels)
                for j in range(INDEX(channels)):
                    row[start + j] = widened(x[number, first + pixel, j])
                squares = square_sum(row, start, end)
                total += squares
                factor = F(1) / max(np.sqrt(squares), F(1e-12))
                for j in range(start, end):
                    row[j] *= factor
            for j in range(length):
                row[j] = widened(narrowed(silu(row[j] * weight[j]), x[0, 0, 0]))
            if keep >= 0:
                for pixel in range(count):
                    start = INDEX(pixel * channels)
                    for j in range(INDEX(channels)):
                        last[keep, first + pixel, j] = narrowed(row[start + j], x[0, 0, 0])
            place(row, count, factors, limits, codes, number, first, frame)
    return total
