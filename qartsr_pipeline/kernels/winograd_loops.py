"""The loops of `winograd`, in what of Python numba compiles. Addresses are in bytes, and so is what is added to them.

Four by four codes of a channel, d, give two by two outputs (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
2016, F(2 x 2, 3 x 3)): At (sum over channels of (G w Gt) * (Bt d B)) A, with

    Bt = 1  0 -1  0     2 G = 2  0  0     At = 1  1  1  0
         0  1  1  0           1  1  1          0  1 -1 -1
         0 -1  1  0           1 -1  1
         0  1  0 -1           0  0  2

That is 16 products in the place of 36. 2 G makes integers of the weights; the 4 that outputs are too large by is in their scale.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from qartsr_pipeline.kernels.loops import OPTIONS
from qartsr_pipeline.kernels.vectors import (
    as_floats,
    floats,
    halves,
    halves_of_bytes,
    halves_of_signed_bytes,
    multiplied_pairs,
    no_words,
    repeated_half,
    repeated_pair,
    words,
    write,
    write_pairs,
)

POSITIONS = 16  # of a transformed tile of 4 x 4
OUTPUTS = 16  # channels that are computed at once
TILES = 6  # that are computed at once: with OUTPUTS they fill the 16 registers of AVX2
CHUNK = 24  # tiles that are transformed at once; 12 and 48 take longer in narrow or in wide layers


@njit(**OPTIONS)
def of_three(a, b, c):
    """2 G of a column."""
    return a + a, a + b + c, a - b + c, c + c


@njit(**OPTIONS)
def transform_weights(codes, first, last, transformed):
    """2 G w (2 G)t of some of the blocks of outputs: (N, 3, 3, C) int8 -> int16 (blocks, POSITIONS, C / 2, OUTPUTS, 2).

    The last block ends with the last output, and shares some with the one before it if OUTPUTS does not divide N.
    """
    outputs, channels = codes.shape[0], codes.shape[3]
    plane, step = 2 * OUTPUTS * channels, 4 * OUTPUTS
    for block in range(first, last):
        rows = codes.ctypes.data + min(OUTPUTS * block, outputs - OUTPUTS) * 9 * channels
        of_block = transformed.ctypes.data + POSITIONS * block * plane
        for start in range(0, channels, 16):
            c = min(start, channels - 16)  # the last ones may be written twice
            for n in range(OUTPUTS):
                at, to = rows + 9 * channels * n + c, of_block + 2 * OUTPUTS * c + 4 * n
                left = column(at, channels)
                middle = column(at + channels, channels)
                right = column(at + 2 * channels, channels)
                for y in range(4):
                    four = of_three(left[y], middle[y], right[y])
                    for x in range(4):
                        write_pairs(four[x], to + (4 * y + x) * plane, step)


@njit(**OPTIONS)
def column(at, channels):
    """2 G of a column of weights, (3, 3, C) bytes."""
    step = 3 * channels
    return of_three(halves_of_signed_bytes(at), halves_of_signed_bytes(at + step), halves_of_signed_bytes(at + 2 * step))


@njit(**OPTIONS)
def transform_rows(rows, zero, columns, line, count):
    """Bt of four rows, the addresses of so many codes each: int16, in four lines."""
    twice = zero + zero
    for start in range(0, count, 16):
        i = min(start, count - 16)  # the last ones may be written twice
        a, b = halves_of_bytes(rows[0] + i), halves_of_bytes(rows[1] + i)
        c, d = halves_of_bytes(rows[2] + i), halves_of_bytes(rows[3] + i)
        to = columns + 2 * i
        write(a - c, to)
        write(b + c - twice, to + line)
        write(c - b, to + 2 * line)
        write(b - d, to + 3 * line)


@njit(**OPTIONS)
def transform_tile(columns, line, channels, tile, plane):
    """(...) B of four pixels in each of the four lines: POSITIONS times C int16, so many bytes apart."""
    for y in range(4):
        for start in range(0, channels, 16):
            i = 2 * min(start, channels - 16)
            at, to = columns + y * line + i, tile + 4 * y * plane + i
            a, b, c, d = halves(at), halves(at + 2 * channels), halves(at + 4 * channels), halves(at + 6 * channels)
            write(a - c, to)
            write(b + c, to + plane)
            write(c - b, to + 2 * plane)
            write(b - d, to + 3 * plane)


@njit(**OPTIONS)
def multiply(tiles, weight, products, channels):
    """(TILES, C) int16 times (C / 2, OUTPUTS, 2) int16 -> (TILES, OUTPUTS) int32."""
    a0 = a1 = b0 = b1 = c0 = c1 = d0 = d1 = e0 = e1 = f0 = f1 = no_words()
    step = 2 * channels
    for pair in range(channels // 2):
        w0, w1, at = halves(weight + 64 * pair), halves(weight + 64 * pair + 32), tiles + 4 * pair
        x = repeated_pair(at)
        a0, a1 = a0 + multiplied_pairs(x, w0), a1 + multiplied_pairs(x, w1)
        x = repeated_pair(at + step)
        b0, b1 = b0 + multiplied_pairs(x, w0), b1 + multiplied_pairs(x, w1)
        x = repeated_pair(at + 2 * step)
        c0, c1 = c0 + multiplied_pairs(x, w0), c1 + multiplied_pairs(x, w1)
        x = repeated_pair(at + 3 * step)
        d0, d1 = d0 + multiplied_pairs(x, w0), d1 + multiplied_pairs(x, w1)
        x = repeated_pair(at + 4 * step)
        e0, e1 = e0 + multiplied_pairs(x, w0), e1 + multiplied_pairs(x, w1)
        x = repeated_pair(at + 5 * step)
        f0, f1 = f0 + multiplied_pairs(x, w0), f1 + multiplied_pairs(x, w1)
    write(a0, products), write(a1, products + 32)
    write(b0, products + 64), write(b1, products + 96)
    write(c0, products + 128), write(c1, products + 160)
    write(d0, products + 192), write(d1, products + 224)
    write(e0, products + 256), write(e1, products + 288)
    write(f0, products + 320), write(f1, products + 352)


@njit(**OPTIONS)
def summed_rows(products, plane):
    """At of one column of four positions."""
    a, b, c, d = words(products), words(products + 4 * plane), words(products + 8 * plane), words(products + 12 * plane)
    return a + b + c, b - c - d


@njit(**OPTIONS)
def finish_tile(products, plane, scale, bias, pixel, right, below):
    """Two by two pixels of OUTPUTS channels, float32, from POSITIONS products so many bytes apart.

    `right` and `below` lead from the first pixel to its neighbours; where the image ends they are 0, and what does not belong to
    it is overwritten.
    """
    for half in range(0, 4 * OUTPUTS, 32):
        a0, a1 = summed_rows(products + half, plane)
        b0, b1 = summed_rows(products + half + plane, plane)
        c0, c1 = summed_rows(products + half + 2 * plane, plane)
        d0, d1 = summed_rows(products + half + 3 * plane, plane)
        factor, summand, to = floats(scale + half), floats(bias + half), pixel + half
        write(as_floats(b1 - c1 - d1) * factor + summand, to + right + below)
        write(as_floats(a1 + b1 + c1) * factor + summand, to + below)
        write(as_floats(b0 - c0 - d0) * factor + summand, to + right)
        write(as_floats(a0 + b0 + c0) * factor + summand, to)


@njit(**OPTIONS)
def finish_chunk(tiles, first, some, weight, scale, bias, products, out):
    """The output of so many transformed tiles, of which the first has this number in the image."""
    rows, width, outputs = out.shape
    channels, in_row = tiles.shape[2], (width + 1) // 2
    plane, product_plane = 2 * CHUNK * channels, 4 * CHUNK * OUTPUTS
    for block in range(weight.shape[0]):
        n = min(OUTPUTS * block, outputs - OUTPUTS)
        for position in range(POSITIONS):
            factors = weight.ctypes.data + (POSITIONS * block + position) * 2 * OUTPUTS * channels
            at, to = tiles.ctypes.data + position * plane, products.ctypes.data + position * product_plane
            for tile in range(0, some, TILES):
                multiply(at + 2 * tile * channels, factors, to + 4 * OUTPUTS * tile, channels)
        constants = (scale.ctypes.data + 4 * n, bias.ctypes.data + 4 * n)
        for tile in range(some):
            y, x = 2 * ((first + tile) // in_row), 2 * ((first + tile) % in_row)
            pixel = out.ctypes.data + 4 * ((y * width + x) * outputs + n)
            right = 4 * outputs if x + 1 < width else 0
            below = 4 * outputs * width if y + 1 < rows else 0
            finish_tile(products.ctypes.data + 4 * OUTPUTS * tile, product_plane, *constants, pixel, right, below)


@njit(**OPTIONS)
def convolve(x, zero, weight, scale, bias, padding, blank, first, last, columns, tiles, products, out):
    """Some of the output's pairs of rows, from `first` to before `last`.

    Args:
        x: (H, W C) uint8 codes, `zero` is that of 0; C is at least 16 and even.
        weight: see `transform_weights`.
        scale, bias: (N,) float32; 4 times the scale is that of the codes' products. N is at least OUTPUTS.
        padding: rows and columns.
        blank: (W C,) uint8, all `zero`.
        columns: int16 (4, (W' + 2 or 3) C), zeros.
        tiles: int16 (POSITIONS, CHUNK, C), to be overwritten; `products`, int32 (POSITIONS, CHUNK, OUTPUTS), too.
        out: (H', W', N) float32, to be overwritten.
    """
    height, length = x.shape
    channels, in_row = tiles.shape[2], (out.shape[1] + 1) // 2
    line, plane = 2 * columns.shape[1], 2 * CHUNK * channels
    codes, empty, lines = np.intp(x.ctypes.data), np.intp(blank.ctypes.data), np.intp(columns.ctypes.data)
    zeros = repeated_half(np.int16(zero))
    filled = 0
    for tile_row in range(first, last):
        y = 2 * tile_row - padding[0]
        four = (
            codes + y * length if 0 <= y < height else empty,
            codes + (y + 1) * length if 0 <= y + 1 < height else empty,
            codes + (y + 2) * length if 0 <= y + 2 < height else empty,
            codes + (y + 3) * length if 0 <= y + 3 < height else empty,
        )
        transform_rows(four, zeros, lines + 2 * padding[1] * channels, line, length)
        for tile in range(in_row):
            transform_tile(lines + 4 * tile * channels, line, channels, tiles.ctypes.data + 2 * filled * channels, plane)
            filled += 1
            if filled == CHUNK or (tile_row + 1 == last and tile + 1 == in_row):
                finish_chunk(tiles, tile_row * in_row + tile + 1 - filled, filled, weight, scale, bias, products, out)
                filled = 0
