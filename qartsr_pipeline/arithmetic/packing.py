"""Packing of unsigned b-bit codes into bytes: the stored form of weights.

A row of K codes is a bit stream: code k occupies bits k*b .. k*b + b - 1, bit 0 is the least significant bit of byte 0. Every row
begins on a byte, so it takes ceil(K * b / 8) bytes; the bits left over are 0. The codes of 2, 4 and 8 bits never straddle a byte;
8 three-bit codes and 4 six-bit codes fill 3 bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUPS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 6: (4, 3), 8: (1, 1)}  # bits -> (codes, bytes) of the smallest whole group


def packed_width(length: int, bits: int) -> int:
    """Bytes that a row of ``length`` codes takes."""
    return -(-length * bits // 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs each row.

    Args:
        codes: integers in [0, 2^bits - 1], any integer dtype, shape (N, K).

    Returns:
        uint8, shape (N, ceil(K * bits / 8)).

    Raises:
        ValueError: if a code does not fit.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    rows, length = codes.shape
    per_group, group_bytes = GROUPS[bits]
    padded = F.pad(codes.to(torch.int32), (0, -length % per_group)).view(rows, -1, per_group)
    shifts = torch.arange(per_group, dtype=torch.int32, device=codes.device) * bits
    words = (padded << shifts).sum(-1, dtype=torch.int32)  # disjoint bits: the sum is their union
    byte_shifts = torch.arange(group_bytes, dtype=torch.int32, device=codes.device) * 8
    stream = ((words[..., None] >> byte_shifts) & 255).to(torch.uint8).view(rows, -1)
    return stream[:, : packed_width(length, bits)].contiguous()


def unpack(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The codes that `pack` packed: uint8, shape (N, length)."""
    rows = packed.shape[0]
    per_group, group_bytes = GROUPS[bits]
    if bits == 8:
        return packed[:, :length]
    groups = F.pad(packed, (0, -packed.shape[1] % group_bytes)).view(rows, -1, group_bytes)
    codes = torch.stack([_bits_from(groups, position * bits, bits) for position in range(per_group)], dim=-1)
    return codes.bitwise_and_(2**bits - 1).view(rows, -1)[:, :length]


def _bits_from(groups: torch.Tensor, first: int, bits: int) -> torch.Tensor:
    """What begins at this bit of every group (.., bytes): uint8 (..), with other bits above those of the code."""
    byte, shift = divmod(first, 8)
    low = groups[..., byte] >> shift
    return low if shift + bits <= 8 else low | groups[..., byte + 1] << (8 - shift)
