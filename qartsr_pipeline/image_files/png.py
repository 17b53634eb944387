"""PNG files in chunks: taken apart, so that damaged metadata does not hide a sound image, and put together with metadata.

Pillow refuses a file whose texts, EXIF, resolution or gamma are damaged or large, and loses most of what it does not refuse. So
it gets the chunks with the pixels only. It also writes no 16-bit colour, which is done here. Format: PNG, third edition.
"""

from __future__ import annotations

import binascii
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from qartsr_pipeline.image_files.image_file import Metadata

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
_COLOUR = {b"gAMA", b"cHRM", b"sRGB", b"cICP", b"mDCV", b"mDCv", b"cLLI", b"cLLi"}
_TEXT = {b"tEXt", b"zTXt", b"iTXt"}
# What says nothing about the enlarged image: histogram, significant bits, background and palette suggestions, time of the last
# change, an encoder's own notes, and the other frames of an animation, whose loss is noticed elsewhere.
_SILENT = {b"hIST", b"sBIT", b"bKGD", b"sPLT", b"tIME", b"iDOT", b"acTL", b"fcTL", b"fdAT"}
_LARGEST = 1 << 26  # bytes that a compressed text or profile may have
_ROWS = 64  # filtered at once


@dataclass
class PngFile:
    """A PNG file, taken apart.

    Attributes:
        pixels: the file without anything but its pixels, for Pillow.
        depth: bits a channel.
        colour_type: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA.
        transparency: of grey and RGB images, the value of each channel that means "transparent", as it is stored.
        frames: of an animation; 1 otherwise.
        problems: of the metadata, one each.
    """

    pixels: bytes
    depth: int
    colour_type: int
    transparency: tuple[int, ...] | None = None
    frames: int = 1
    metadata: dict[str, bytes] = field(default_factory=dict)
    resolution: tuple[float, float] | None = None
    chunks: list[tuple[bytes, bytes]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def take_apart(data: bytes) -> PngFile:
    """A PNG file in parts.

    Raises:
        ValueError: it does not begin with a header.
    """
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise ValueError("the header is missing")
    depth, colour_type = data[24], data[25]
    png, essential = PngFile(b"", depth, colour_type), [SIGNATURE]
    for name, content, whole, sound in _chunks(data):
        if name in _PIXELS or (name == b"tRNS" and colour_type == 3):
            essential.append(whole)
        elif not sound:
            png.problems.append(f"{_printable(name)} is damaged")
        else:
            try:
                _take(png, name, content)
            except (ValueError, IndexError, struct.error, zlib.error) as error:
                png.problems.append(f"{_printable(name)} is damaged ({error})")
    png.pixels = b"".join(essential)
    return png


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes, bool]]:
    """Name, content, the chunk as it is, and whether its checksum is right. The last one may be cut off."""
    position = len(SIGNATURE)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        whole = data[position:end]
        content = whole[8 : 8 + length]
        # Pillow checks the pixels' own.
        sound = name in _PIXELS or whole[8 + length :] == struct.pack(">I", zlib.crc32(whole[4 : 8 + length]))
        yield name, content, whole, sound
        if name == b"IEND":
            return
        position = end


def _take(png: PngFile, name: bytes, content: bytes) -> None:
    """Files one chunk under what it holds."""
    if name == b"tRNS" and png.colour_type in (0, 2):
        png.transparency = struct.unpack(">H" if png.colour_type == 0 else ">3H", content)
    elif name in _COLOUR:
        lengths = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4}
        if len(content) != lengths.get(name, len(content)):
            raise ValueError("wrong length")
        png.chunks.append((name, content))
    elif name == b"pHYs":
        x, y, unit = struct.unpack(">IIB", content)
        if unit == 1 and x and y:  # pixels per metre; otherwise only the shape of a pixel
            png.resolution = (x * 0.0254, y * 0.0254)
    elif name == b"iCCP":
        png.metadata["icc_profile"] = _inflated(content.partition(b"\0")[2][1:])
    elif name == b"eXIf":
        png.metadata["exif"] = content
    elif name in _TEXT:
        _take_text(png, name, content)
    elif name == b"acTL":
        png.frames = struct.unpack(">II", content)[0]
    elif name == b"caBX":
        png.problems.append("the content credentials (C2PA) do not hold for a changed image")
    elif name not in _SILENT and name != b"tRNS":
        png.problems.append(f"{_printable(name)} is a chunk of unknown meaning")


def _take_text(png: PngFile, name: bytes, content: bytes) -> None:
    keyword, _, rest = content.partition(b"\0")
    if keyword == b"XML:com.adobe.xmp" and name == b"iTXt":
        text = rest[2:].split(b"\0", 2)[2]
        png.metadata["xmp"] = _inflated(text) if rest[:1] == b"\1" else text
    elif keyword.startswith(b"Raw profile type "):  # how ImageMagick stores what PNG had no chunk for
        text = _inflated(rest[1:]) if name == b"zTXt" else rest
        kind = {"APP1": "exif", "exif": "exif", "iptc": "iptc", "xmp": "xmp", "icc": "icc_profile", "icm": "icc_profile"}
        field_name = kind.get(keyword.removeprefix(b"Raw profile type ").decode("latin-1"))
        if field_name is None:
            raise ValueError(f"{keyword.decode('latin-1')} is a profile of unknown meaning")
        value = binascii.unhexlify(b"".join(text.split()[2:]))
        # "APP1" is used for both.
        is_xmp = field_name == "exif" and value.startswith(b"http://ns.adobe.com/xap/1.0/\0")
        if is_xmp:
            field_name, value = "xmp", value.partition(b"\0")[2]
        png.metadata.setdefault(field_name, value)
    else:
        png.chunks.append((name, content))


def _inflated(data: bytes) -> bytes:
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(data, _LARGEST)
    if decompressor.unconsumed_tail:
        raise ValueError(f"more than {_LARGEST >> 20} MiB")
    if not decompressor.eof:
        raise ValueError("it ends too early")
    return text


def _printable(name: bytes) -> str:
    return f"the chunk {name.decode('latin-1')}" if name.isalpha() else "a chunk without a name"


def keywords(chunks: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The keywords of the texts among the chunks."""
    return [content.partition(b"\0")[0].decode("latin-1") for name, content in chunks if name in _TEXT]


def colour_chunks(chunks: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The names of the chunks that give the pixels' values another meaning than sRGB."""
    found = {name: content for name, content in chunks if name in _COLOUR}
    if b"cICP" in found:
        ordinary_names = {b"cICP"} if found[b"cICP"][:2] == bytes([1, 13]) else set()  # BT.709 primaries, sRGB transfer
    elif b"sRGB" in found:
        return []
    else:
        ordinary = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
        gamma = struct.unpack(">I", found.get(b"gAMA", struct.pack(">I", 45455)))[0]
        ordinary_names = {b"gAMA"} if 45000 <= gamma <= 46000 else set()
        ordinary_names |= {b"cHRM"} if found.get(b"cHRM") == ordinary else set()
    return sorted(name.decode() for name in set(found) - ordinary_names)


def with_metadata(encoded: bytes | memoryview, metadata: Metadata) -> bytes:
    """A PNG file that has nothing but pixels, with the metadata behind its header."""
    chunks = [chunk for chunk in metadata.png_chunks if chunk[0] in _COLOUR]
    if metadata.icc_profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc_profile)))
    if metadata.resolution:
        x, y = (min(round(value / 0.0254), 2**31 - 1) for value in metadata.resolution)
        chunks.append((b"pHYs", struct.pack(">IIB", x, y, 1)))
    if metadata.exif:
        chunks.append((b"eXIf", metadata.exif))
    if metadata.xmp:
        chunks.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    if metadata.iptc:
        text = f"\niptc\n{len(metadata.iptc):8}\n{metadata.iptc.hex()}\n".encode()
        chunks.append((b"zTXt", b"Raw profile type iptc\0\0" + zlib.compress(text)))
    if metadata.comment:
        # tEXt is Latin-1; iTXt is UTF-8
        plain = metadata.comment.rstrip(b"\0").replace(b"\0", b" ")
        chunks.append((b"iTXt", b"Comment\0\0\0\0\0" + plain) if _is_utf8(plain) else (b"tEXt", b"Comment\0" + plain))
    chunks += [chunk for chunk in metadata.png_chunks if chunk[0] not in _COLOUR]
    header, encoded = len(SIGNATURE) + 25, memoryview(encoded)  # slices of it are no copies
    return b"".join([encoded[:header], *(chunk(*one) for one in chunks), encoded[header:]])


def chunk(name: bytes, content: bytes) -> bytes:
    """One chunk: length, name, content, checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def encode_sixteen_bits(pixels: np.ndarray) -> bytes:
    """A 16-bit PNG file of (H, W, C) uint16, C = 1, 2, 3 or 4, without metadata."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = pixels.astype(">u2").view(np.uint8).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", _compressed(rows, 2 * channels)) + chunk(b"IEND", b"")


def _compressed(rows: np.ndarray, step: int) -> bytes:
    """The rows, (H, bytes) uint8 with `step` bytes a pixel, filtered and compressed block by block: small temporaries."""
    compressor = zlib.compressobj(6)
    with_first = np.pad(rows[:1], ((1, 0), (0, 0)))  # above the first row are zeros
    packed = [compressor.compress(_filtered(with_first, step))]
    for start in range(0, len(rows) - 1, _ROWS):
        packed.append(compressor.compress(_filtered(rows[start : start + _ROWS + 1], step)))
    return b"".join([*packed, compressor.flush()])


def _filtered(rows: np.ndarray, step: int) -> bytes:
    """PNG's filter type 4 (Paeth), with which photographs compress best, on every row but the first, which is only above."""
    padded = np.pad(rows.astype(np.int16), ((0, 0), (step, 0)))
    rows = rows[1:]
    left, above, corner = padded[1:, :-step], padded[:-1, step:], padded[:-1, :-step]
    distance = [np.abs(above - corner), np.abs(left - corner), np.abs(left + above - 2 * corner)]
    nearest = np.where(distance[1] <= distance[2], above, corner)
    nearest = np.where((distance[0] <= distance[1]) & (distance[0] <= distance[2]), left, nearest)
    filtered = np.empty((rows.shape[0], rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 4
    filtered[:, 1:] = (rows - nearest).astype(np.uint8)
    return filtered.tobytes()
