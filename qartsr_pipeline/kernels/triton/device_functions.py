"""Device functions: numbers that mean the same on a GPU and in Triton's interpreter, and tiles of packed weights.

The interpreter (triton 3.9) multiplies the bit patterns of bfloat16 in `tl.dot` and cuts where a GPU rounds to bfloat16; the two
functions that step around that are the plain operations on a GPU. Only built-in operations of triton.language are used in all
kernels, not its library functions (`tl.sum`, `tl.zeros`, ...): these exist either compiled or interpreted, as triton was first
imported in the process.

Weights are stored as a bit stream per output (`arithmetic.packing`), the channel fastest; they are read as stored, and given as
centred codes in signed bytes. The fast form reads whole words and halves them again and again, low half first, which is the
stream's own order: nothing is repacked and no byte is read twice. A word is a byte for 2, 4 and 8 bits; 3 and 6 bits take 24 of
the 96 bits of three 32-bit words. The slow form, for channels that are no multiple of 32, gathers the one or two bytes of every
code.

Assumed of the GPU, and hidden by the interpreter: interleaving two halves stays within a thread's registers, because `tl.join`
puts the pair there; the loads of the fast form are at least 4 bytes wide and so can be asynchronous copies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qartsr_pipeline.kernels.triton import interpreted

INTERPRETED = tl.constexpr(interpreted())
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2^23: float32 numbers of this size are whole, so adding it rounds half to even


@triton.jit
def round_into(values, low, high):
    """clamp(rint(values), low, high) in float32 for whole low and high within +-2^21; NaN gives 0.

    Clamping first is the same, as rint is monotone and leaves whole numbers alone. It also stands between the caller's product
    and the addition, so that no compiler makes one fused operation of them, which would round only once.
    """
    values = tl.where(values == values, values, 0.0)
    values = tl.minimum(tl.maximum(values, low), high)
    return (values + ROUNDER) - ROUNDER


@triton.jit
def convert(values, dtype: tl.constexpr):
    """float32 -> ``dtype``, rounding to nearest even."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = values.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
            values = tl.where(values == values, rounded, values)
    return values.to(dtype)


@triton.jit
def dot_float(a, b, total):
    """total + a @ b in float32, for operands of one floating dtype; float32 operands without TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


def readable(weight_packed: torch.Tensor, bits: int, channels: int) -> tuple[torch.Tensor, bool]:
    """The packed rows as `weight_tile` reads them, and whether it may use the fast form (ALIGNED). No copy."""
    aligned = channels % 32 == 0
    if bits not in (3, 6):
        return weight_packed, aligned
    aligned = aligned and weight_packed.data_ptr() % 4 == 0 and weight_packed.storage_offset() % 4 == 0
    return (weight_packed.view(torch.int32) if aligned else weight_packed), aligned


@triton.jit
def _interleave(first, second):
    """(R, J) and (R, J) -> (R, 2 J), taking turns along J."""
    return tl.reshape(tl.join(first, second), (first.shape[0], 2 * first.shape[1]))


@triton.jit
def _halves(values, BITS: tl.constexpr):
    """(R, J) numbers of 2 BITS bits -> (R, 2 J) numbers of BITS bits, the low half of each first."""
    return _interleave(values & ((1 << BITS) - 1), values >> BITS)


@triton.jit
def _codes_in_bytes(weight_ptr, outputs, step, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK_K: tl.constexpr):
    WIDTH: tl.constexpr = BLOCK_K * BITS // 8
    columns = step * WIDTH + tl.arange(0, WIDTH)
    codes = tl.load(weight_ptr + outputs[:, None] * ROW_BYTES + columns[None, :])
    if BITS < 8:
        codes = _halves(codes, 4)
    if BITS == 2:
        codes = _halves(codes, 2)
    return codes


@triton.jit
def _codes_in_words(weight_ptr, outputs, step, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK_K: tl.constexpr):
    """``weight_ptr`` points to 32-bit words here; 3 of them hold 4 numbers of 24 bits."""
    TRIPLES: tl.constexpr = BLOCK_K * BITS // 96
    columns = 3 * (step * TRIPLES + tl.arange(0, TRIPLES))
    words = weight_ptr + outputs[:, None] * (ROW_BYTES // 4) + columns[None, :]
    first = tl.load(words).to(tl.uint32, bitcast=True)
    second = tl.load(words + 1).to(tl.uint32, bitcast=True)
    third = tl.load(words + 2).to(tl.uint32, bitcast=True)
    even = _interleave(first & 0xFFFFFF, (second >> 16) | ((third & 0xFF) << 16))
    odd = _interleave((first >> 24) | ((second & 0xFFFF) << 8), third >> 8)
    codes = _halves(_interleave(even, odd), 12)
    codes = _halves(codes, 6)
    if BITS == 3:
        codes = _halves(codes, 3)
    return codes


@triton.jit
def _codes_gathered(weight_ptr, outputs, first, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes number ``first`` and on; what lies beyond the row reads as its last byte."""
    bit = (first + tl.arange(0, BLOCK_K)) * BITS
    byte = tl.minimum(bit >> 3, ROW_BYTES - 1)
    row = weight_ptr + outputs[:, None] * ROW_BYTES
    codes = tl.load(row + byte[None, :]).to(tl.int32)
    if BITS == 3 or BITS == 6:
        codes |= tl.load(row + tl.minimum(byte + 1, ROW_BYTES - 1)[None, :]).to(tl.int32) << 8
    return (codes >> (bit & 7)[None, :]) & ((1 << BITS) - 1)


@triton.jit
def weight_tile(
    weight_ptr,
    zero_points,
    outputs,
    tap,
    block,
    BITS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Centred codes int8 (outputs, BLOCK_K) of block ``block`` of the channels of tap ``tap``; 0 beyond the last channel.

    Args:
        weight_ptr: the packed rows, as bytes; as 32-bit words if ALIGNED with 3 or 6 bits.
        zero_points: int8 (outputs), None for 8 bits.
        outputs: int32, rows to read, all of them existing.
        ALIGNED: the fast form; CHANNELS must be a multiple of BLOCK_K, and the rows' first byte lie on 4 bytes for 3 and 6 bits.
    """
    if ALIGNED:
        step = tap * (CHANNELS // BLOCK_K) + block
        if BITS == 3 or BITS == 6:
            codes = _codes_in_words(weight_ptr, outputs, step, BITS, ROW_BYTES, BLOCK_K)
        else:
            codes = _codes_in_bytes(weight_ptr, outputs, step, BITS, ROW_BYTES, BLOCK_K)
    else:
        codes = _codes_gathered(weight_ptr, outputs, tap * CHANNELS + block * BLOCK_K, BITS, ROW_BYTES, BLOCK_K)
    if BITS == 8:
        codes = codes.to(tl.uint8).to(tl.int8, bitcast=True)
    else:
        codes = codes.to(tl.int8) - zero_points[:, None]
    if not ALIGNED:
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        codes = tl.where((channels < CHANNELS)[None, :], codes, tl.full((1, 1), 0, tl.int8))
    return codes
