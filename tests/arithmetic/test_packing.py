"""The bit stream of packed codes, against one that Python's big integers make."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qartsr_pipeline.arithmetic.affine import BITS
from qartsr_pipeline.arithmetic.packing import pack, packed_width, unpack


def bit_stream(row: list[int], bits: int) -> bytes:
    """Code k at bits k * b .. k * b + b - 1 of one long little-endian number."""
    number = sum(code << (position * bits) for position, code in enumerate(row))
    return number.to_bytes(-(-len(row) * bits // 8), "little")


@settings(max_examples=60, derandomize=True, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 3), length=st.integers(1, 27), seed=st.integers(0, 2**16))
def test_bytes_are_the_bit_stream_and_come_back(bits: int, rows: int, length: int, seed: int):
    codes = torch.randint(0, 2**bits, (rows, length), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, packed_width(length, bits)) and packed.is_contiguous()
    assert [bytes(row) for row in packed.tolist()] == [bit_stream(row, bits) for row in codes.tolist()]
    back = unpack(packed, bits, length)
    assert back.dtype == torch.uint8 and torch.equal(back.long(), codes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_dtype_packs_alike(dtype: torch.dtype):
    assert pack(torch.tensor([[7, 0, 5]], dtype=dtype), 3).tolist() == [[0b01000111, 0b1]]


@pytest.mark.parametrize("bits", BITS)
def test_extreme_codes(bits: int):
    largest = 2**bits - 1
    codes = torch.full((2, 9), largest)
    assert unpack(pack(codes, bits), bits, 9).tolist() == codes.tolist()
    for wrong in (largest + 1, -1):
        with pytest.raises(ValueError, match=f"do not fit {bits} bits"):
            pack(torch.tensor([[0, wrong]]), bits)
