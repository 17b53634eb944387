"""EXIF and XMP: copied byte for byte, except for the orientation and the size in pixels, which are changed in place.

An EXIF block is a small TIFF file: a header, and directories of tags whose longer values lie elsewhere in the block. Parsing it
and writing it again, as Pillow and piexif do, loses texts that are not ASCII and breaks maker notes, which count their offsets
from the start of the block. So nothing is moved here. Formats: TIFF 6.0, section 2, and CIPA DC-008 (EXIF 2.32).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Protocol

from PIL.ExifTags import IFD, Base

_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}  # by type of value
_BIG_VALUE_BYTES = {**_VALUE_BYTES, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_LARGEST = 1 << 24  # bytes of one value: no description is longer
# Tags of a TIFF file's own directory that describe the photograph. The others say where its strips lie and how they are packed.
_DESCRIBING = {
    *(Base.DocumentName, Base.ImageDescription, Base.Make, Base.Model, Base.Orientation, Base.PageName, Base.Software),
    *(Base.XResolution, Base.YResolution, Base.ResolutionUnit, Base.DateTime, Base.Artist, Base.HostComputer, Base.Copyright),
    *(Base.Rating, Base.RatingPercent, Base.XPTitle, Base.XPComment, Base.XPAuthor, Base.XPKeywords, Base.XPSubject),
    *(Base.ExifOffset, Base.GPSInfo),
}
_DIRECTORIES = {Base.ExifOffset, Base.GPSInfo, IFD.Interop}


class ExifError(ValueError):
    """An EXIF block is damaged."""


class Bytes(Protocol):
    """`bytes`, `bytearray`, or a memory map."""

    def __len__(self) -> int: ...

    def __getitem__(self, where: slice, /) -> bytes | bytearray: ...


@dataclass(frozen=True)
class Tag:
    """One tag of a directory.

    Attributes:
        kind: the type of its values, 1 to 13 (2 is text, 3 a 16-bit and 4 a 32-bit integer, 5 a fraction); 16 to 18 in BigTIFF.
        data: the values as they are stored.
        position: of the tag in the block.
        children: the tags of the directory that it points to.
        slot: the four bytes that stand for a value which is elsewhere already, see `kept_in_place`.
    """

    number: int
    kind: int
    count: int
    data: bytes
    position: int = 0
    children: tuple[Tag, ...] | None = None
    slot: bytes | None = None

    def integers(self, order: str) -> tuple[int, ...]:
        """Its values; none unless they are integers. `order` is `<` or `>`."""
        code = _INTEGERS.get(self.kind)
        return struct.unpack(f"{order}{self.count}{code}", self.data) if code else ()


class Directories:
    """Reads the directories of an EXIF block, or of a TIFF or BigTIFF file.

    Raises:
        ExifError: the header or a directory is damaged.
    """

    def __init__(self, block: Bytes):
        self.block = block
        self.order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]), "")
        if not self.order or len(block) < 8:
            raise ExifError("it does not begin like one")
        self.big = self._number(2, "H") == 43
        self.left = 4 * _LARGEST
        self.first = self._number(8, "Q") if self.big else self._number(4, "I")

    def read(self, offset: int) -> list[Tag]:
        """The tags of the directory at `offset`; those with values of unknown type or outside of the block are left out."""
        count = self._number(offset, "Q" if self.big else "H")
        start, step = (offset + 8, 20) if self.big else (offset + 2, 12)
        if count > 65535 or start + step * count > len(self.block):
            raise ExifError("a directory reaches beyond its end")
        tags = (self._tag(start + step * index) for index in range(count))
        return [tag for tag in tags if tag is not None]

    def next_position(self, offset: int) -> int:
        """Where the directory at `offset` (not BigTIFF) says where the following one begins."""
        return offset + 2 + 12 * self._number(offset, "H")

    def first_of(self, tags: Iterable[Tag], number: int) -> int | None:
        """The first value of a tag of integers; None where it is missing."""
        values = next((tag.integers(self.order) for tag in tags if tag.number == number), ())
        return values[0] if values else None

    def with_children(self, tags: Iterable[Tag]) -> list[Tag]:
        """The tags, with the directories that they point to; those that lead nowhere are left out."""
        result = []
        for tag in tags:
            if tag.number in _DIRECTORIES:
                try:
                    found = self.read((tag.integers(self.order) or (len(self.block),))[0])
                except ExifError:
                    continue
                # Below EXIF's own directory is one more; what leads back to a higher one would never end.
                inner = self.with_children(one for one in found if one.number not in (Base.ExifOffset, Base.GPSInfo, tag.number))
                tag = replace(tag, children=tuple(inner))
            result.append(tag)
        return result

    def _tag(self, position: int) -> Tag | None:
        number, kind = self._number(position, "H"), self._number(position + 2, "H")
        count = self._number(position + 4, "Q" if self.big else "I")
        size = count * _BIG_VALUE_BYTES.get(kind, 0)
        inside = position + (12 if self.big else 8)
        start = inside if size <= (8 if self.big else 4) else self._number(inside, "Q" if self.big else "I")
        if not 0 < size <= _LARGEST or start + size > len(self.block):
            return None
        self.left -= size
        if self.left < 0:
            raise ExifError("its values are too many")
        return Tag(number, kind, count, bytes(self.block[start : start + size]), position)

    def _number(self, position: int, code: str) -> int:
        size = struct.calcsize(code)
        data = self.block[position : position + size]
        if len(data) < size:
            raise ExifError("it ends too early")
        return struct.unpack(self.order + code, data)[0]


def upright(block: bytes) -> tuple[bytes, int]:
    """The block with its orientation reset and without the preview of the source; and the orientation, 1 to 8, that it had.

    Raises:
        ExifError: the block is damaged.
    """
    block = block.removeprefix(b"Exif\0\0")
    directories = Directories(block)
    tags = directories.read(directories.first)
    turn = directories.first_of(tags, Base.Orientation)
    changed = _with_integers(block, directories.order, tags, {Base.Orientation: 1})
    after = directories.next_position(directories.first)
    if len(changed) >= after + 4:
        changed[after : after + 4] = bytes(4)
    return bytes(changed), turn if turn and turn <= 8 else 1


def with_size(block: bytes, height: int, width: int) -> bytes:
    """The block with the image's new size, where it records one."""
    directories = Directories(block)
    first = directories.read(directories.first)
    changed = _with_integers(block, directories.order, first, {Base.ImageWidth: width, Base.ImageLength: height})
    for tag in directories.with_children(first):
        if tag.number == Base.ExifOffset:
            sizes = {int(Base.ExifImageWidth): width, int(Base.ExifImageHeight): height}
            changed = _with_integers(changed, directories.order, tag.children or (), sizes)
    return bytes(changed)


def resolution(block: bytes) -> tuple[float, float] | None:
    """Pixels per inch, (horizontal, vertical), that a block states; None without one."""
    directories = Directories(block)
    tags = directories.read(directories.first)
    return resolution_of(tags, directories.order)


def resolution_of(tags: Iterable[Tag], order: str) -> tuple[float, float] | None:
    """As `resolution`, for the tags of a directory."""
    values = {tag.number: tag for tag in tags}
    pair = [values.get(number) for number in (Base.XResolution, Base.YResolution)]
    unit = values[Base.ResolutionUnit].integers(order)[:1] if Base.ResolutionUnit in values else (2,)
    found = []
    for tag in pair:
        if tag is None or tag.kind != 5 or unit not in ((2,), (3,)):
            return None
        numerator, denominator = struct.unpack(f"{order}2I", tag.data[:8])
        found.append(numerator / denominator * (1 if unit == (2,) else 2.54) if denominator else 0.0)
    return (found[0], found[1]) if min(found) > 0 else None


def block_of_tiff(directories: Directories, tags: Sequence[Tag]) -> bytes | None:
    """An EXIF block of the describing tags among those of a TIFF file's first directory; None if there are none."""
    kept = directories.with_children(tag for tag in tags if tag.number in _DESCRIBING and tag.kind in _VALUE_BYTES | {18: 8})
    if not kept or {tag.number for tag in kept} == {Base.Orientation}:
        return None
    header = b"II*\0" if directories.order == "<" else b"MM\0*"
    return header + struct.pack(f"{directories.order}I", 8) + packed(kept, directories.order, 8)


def block_with_resolution(pixels_per_inch: tuple[float, float]) -> bytes:
    """An EXIF block that holds nothing else."""
    numbers = (Base.XResolution, Base.YResolution)
    fractions = [Fraction(round(value, 2)).limit_denominator(100) for value in pixels_per_inch]
    tags = [
        Tag(number, 5, 1, struct.pack("<2I", one.numerator, one.denominator))
        for number, one in zip(numbers, fractions, strict=True)
    ]
    tags.append(Tag(Base.ResolutionUnit, 3, 1, struct.pack("<H", 2)))
    return b"II*\0" + struct.pack("<I", 8) + packed(tags, "<", 8)


def kept_in_place(tag: Tag, block: bytes) -> Tag:
    """The tag for another directory of the same block: its values, and the directories that it points to, stay where they are."""
    return replace(tag, slot=block[tag.position + 8 : tag.position + 12])


def packed(tags: Iterable[Tag], order: str, start: int) -> bytes:
    """A directory that begins at `start`, followed by the values that do not fit into it."""
    ordered = sorted(tags, key=lambda tag: tag.number)
    head, tail = struct.pack(f"{order}H", len(ordered)), b""
    first = start + 2 + 12 * len(ordered) + 4
    for tag in ordered:
        kind, count, value = tag.kind, tag.count, tag.data
        if tag.slot is not None:
            value = tag.slot
        elif tag.children is not None:
            kind, count, value = 4, 1, struct.pack(f"{order}I", first + len(tail))
            tail += packed(tag.children, order, first + len(tail))
        elif len(value) > 4:
            value = struct.pack(f"{order}I", first + len(tail))
            tail += tag.data + bytes(len(tag.data) % 2)
        head += struct.pack(f"{order}HHI", tag.number, kind, count) + value.ljust(4, b"\0")
    return head + bytes(4) + tail


def _with_integers(block: Bytes, order: str, tags: Iterable[Tag], values: dict[int, int]) -> bytearray:
    """The block with other values for tags that hold one integer each."""
    changed = bytearray(block[:])
    for tag in tags:
        if tag.number in values and tag.count == 1 and tag.kind in (1, 3, 4):
            kind = tag.kind if values[tag.number] < 1 << 8 * _VALUE_BYTES[tag.kind] else 4
            new = struct.pack(f"{order}{_INTEGERS[kind]}", values[tag.number])
            changed[tag.position + 2 : tag.position + 4] = struct.pack(f"{order}H", kind)
            changed[tag.position + 8 : tag.position + 12] = new.ljust(4, b"\0")
    return changed


def upright_xmp(packet: bytes) -> bytes:
    """The packet with its orientation reset; it may be there as an attribute or as an element."""
    return re.sub(rb"(tiff:Orientation(?:>|\s*=\s*[\"'])\s*)[2-8]", rb"\g<1>1", packet)


def xmp_with_size(packet: bytes, height: int, width: int) -> bytes:
    """The packet with the image's new size, where it records one."""
    for name, value in {"ImageWidth": width, "ImageLength": height, "PixelXDimension": width, "PixelYDimension": height}.items():
        pattern = rb"((?:tiff|exif):%s(?:>|\s*=\s*[\"'])\s*)\d+" % name.encode()
        packet = re.sub(pattern, rb"\g<1>%d" % value, packet)
    return packet
