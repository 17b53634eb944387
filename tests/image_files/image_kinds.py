"""Files written from their formats' specifications, independently of the package and of Pillow."""

import struct
import zlib

import numpy as np


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_file(samples, depth, colour_type, extra=b""):
    """A PNG file of samples (H, W, C), each of `depth` bits; `extra` are chunks that stand before the pixels."""
    height, width = samples.shape[:2]
    rows = b""
    for row in samples.reshape(height, -1):
        bits = (row[:, None] >> np.arange(depth - 1, -1, -1)) & 1
        rows += b"\0" + np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    body = [chunk(b"IHDR", header), extra, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def exif_block(tags, order="<", inner=(), thumbnail=False):
    """An EXIF block without `Exif\\0\\0`: tags are (number, type, count, bytes), `inner` those of the EXIF directory."""

    def directory(tags, start, following=0):
        head, tail = struct.pack(f"{order}H", len(tags)), b""
        for number, kind, count, data in sorted(tags):
            if len(data) > 4:
                place = start + 2 + 12 * len(tags) + 4 + len(tail)
                tail += data + bytes(len(data) % 2)
                data = struct.pack(f"{order}I", place)
            head += struct.pack(f"{order}HHI", number, kind, count) + data.ljust(4, b"\0")
        return head + struct.pack(f"{order}I", following) + tail

    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    tags = list(tags)
    if inner:
        tags.append((0x8769, 4, 1, bytes(4)))
        size = len(directory(tags, 8))
        tags[-1] = (0x8769, 4, 1, struct.pack(f"{order}I", 8 + size))
        return header + directory(tags, 8, 8 if thumbnail else 0) + directory(list(inner), 8 + size)
    return header + directory(tags, 8, 8 if thumbnail else 0)


def text(number, value):
    """An ASCII tag, in whatever encoding `value` is."""
    return number, 2, len(value) + 1, value + b"\0"


def short(number, value, order="<"):
    return number, 3, 1, struct.pack(f"{order}H", value)


def turned(pixels, orientation):
    """(H, W, C) as stored -> as seen, by EXIF's table: where row 0 and column 0 of the stored image lie."""
    return {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
        8: lambda x: np.rot90(x, 1),
    }[orientation](pixels)
