"""Finds the weight files of a component and reads their headers, without reading any weight.

A safetensors file is 8 bytes of length in little-endian order, a JSON header of that length, then the data. The header must
describe the file byte for byte, so a truncated or padded file is recognized. Large weights are in parts, with a listing that says
which tensor is in which. Nothing else is opened: a pickle could run code.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qartsr_pipeline.checkpoint_files.integrity import RENEW, CheckpointError, check_readable, parse_json, read_json

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
REFUSAL = "Pickles can run any code when they are opened, so they are refused and never executed"
INCOMPLETE = "the folder is incomplete. Download or save the checkpoint again, whole."
# Bytes. A header of so many would describe 100,000 tensors; a larger number means that the file is of another format.
_LARGEST_HEADER = 16_000_000
_HOLE = 1 << 30  # a file that occupies so many bytes less than it has, and less than a sixteenth of them, is a hole
# Bits of an element, by the name that safetensors gives its dtype.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a safetensors header describes it; `dtype` as the format writes it: F32, F16, U8 .."""

    dtype: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path, name: str, stem: str, variant: str | None = None) -> dict[str, StoredTensor]:
    """The tensors in the weight files of a component: one safetensors file, or parts with the listing that diffusers writes.

    Raises:
        CheckpointError: none, both, pickles, a part that is missing or damaged, or a listing that does not fit the parts.
    """
    component = folder / name
    for infix in ([f".{variant}"] if variant else []) + [""]:
        single = component / f"{stem}{infix}.safetensors"
        # The second is the name that diffusers gave listings of variants up to 0.36.
        listings = [f"{stem}.safetensors.index{infix}.json", f"{stem}.safetensors{infix}.index.json"]
        found = [component / listing for listing in dict.fromkeys(listings) if os.path.lexists(component / listing)]
        if found and os.path.lexists(single):
            raise CheckpointError(
                f"{name} in {folder} has its weights twice, in {single.name} and in the parts that {found[0].name} lists: one of"
                " them is of an earlier save. Remove the older one, or save the pipeline again with `save_pretrained`."
            )
        if found:
            return _tensors_in_parts(folder, name, found[0])
        if os.path.lexists(single):
            return check_safetensors(single, f"{name}/{single.name} in {folder}")
    raise CheckpointError(_why_no_weights(folder, name, stem, variant))


def _tensors_in_parts(folder: Path, name: str, listing: Path) -> dict[str, StoredTensor]:
    label = f"{name}/{listing.name} in {folder}"
    places = read_json(listing, label).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(part, str) for part in places.values()):
        raise CheckpointError(f"{label} has no weight_map that says which tensor is in which file. {RENEW}")
    stored: dict[str, StoredTensor] = {}
    for part in sorted(set(places.values())):
        if not re.fullmatch(r"[\w.-]+\.safetensors", part):
            pickled = f" {REFUSAL}." if part.endswith(PICKLES) else ""
            raise CheckpointError(
                f"{label} names {part[:80]!r}, but parts are safetensors files in the same folder.{pickled} {RENEW}"
            )
        if not os.path.lexists(listing.parent / part):
            raise CheckpointError(
                f"{folder} lacks {name}/{part}, which {listing.name} lists: {INCOMPLETE} If {listing.name} is left over from an"
                f" earlier save, remove it."
            )
        held = check_safetensors(listing.parent / part, f"{name}/{part} in {folder}")
        wrong = [tensor for tensor in held if places.get(tensor) != part]
        wrong += [tensor for tensor, place in places.items() if place == part and tensor not in held]
        if wrong:
            raise CheckpointError(
                f"{label} and {name}/{part} disagree about {min(wrong)[:120]!r}: they are of different saves. {RENEW}"
            )
        stored |= held
    return stored


def _why_no_weights(folder: Path, name: str, stem: str, variant: str | None) -> str:
    files = sorted(path.name for path in (folder / name).iterdir())
    pickles = [file for file in files if file.endswith(PICKLES)]
    others = [match[1] for file in files if (match := re.match(rf"{stem}\.([\w-]+)\.(?:safetensors|index)", file))]
    others += [match[1] for file in files if (match := re.match(rf"{stem}\.safetensors\.index\.([\w-]+)\.json", file))]
    if others and not pickles:
        found = f"those of the variant {others[0]!r}: load it with variant={others[0]!r}, or rename them."
        return f"{folder} lacks the weights {name}/{stem}.safetensors and holds only {found}"
    if pickles:
        return (
            f"{name}/{pickles[0]} in {folder} is a pickle where {stem}.safetensors belongs. {REFUSAL}."
            f" Ask for the checkpoint as safetensors, or convert it where you trust its source."
        )
    return f"{folder} lacks the weights {name}/{stem}{f'.{variant}' if variant else ''}.safetensors: {INCOMPLETE}"


def check_safetensors(path: Path, label: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name, from its header alone.

    Args:
        label: the file's name in messages, for instance `unet/diffusion_pytorch_model.safetensors`.

    Raises:
        CheckpointError: another kind of file, truncated, with bytes that no tensor uses, or with a header that is not valid.
    """
    status = check_readable(path, label)
    size = status.st_size
    with open(path, "rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if size < 8 or not 2 <= length <= _LARGEST_HEADER:
            pickled = ", but a pickle, which could run code" if first[:2] == b"PK" or first[:1] == b"\x80" else ""
            raise CheckpointError(f"{label} is not a safetensors file{pickled} ({size} bytes, no header at its start). {RENEW}")
        header_bytes = file.read(length)
    if len(header_bytes) < length:
        raise CheckpointError(f"{label} is truncated: it ends within its header, after {size} bytes. {RENEW}")
    try:
        tensors, end = _read_header(header_bytes)
    except ValueError as error:
        raise CheckpointError(
            f"{label} is damaged: its header is not valid in the safetensors format ({str(error)[:200]}). {RENEW}"
        ) from error
    expected = 8 + length + end
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise CheckpointError(f"{label} is {state}: it has {size} bytes, its header describes {expected}. {RENEW}")
    occupied = getattr(status, "st_blocks", size) * 512  # Windows does not say
    # Less than the header takes: the file system does not say either, or has not yet decided where the file goes.
    if size - occupied > _HOLE and 4096 <= occupied < size / 16:
        raise CheckpointError(
            f"{label} is damaged: of its {size:,} bytes only {occupied:,} were ever written, as after an interrupted download."
            f" {RENEW}"
        )
    return tensors


def _read_header(header_bytes: bytes) -> tuple[dict[str, StoredTensor], int]:
    """The tensors that a header describes and the bytes of their data; ValueError unless they follow each other without a gap."""
    header = parse_json(header_bytes)
    if not isinstance(header, dict) or not header_bytes.startswith(b"{"):
        raise ValueError("it is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is not a table of texts")
    tensors, spans = {}, []
    for name, entry in header.items():
        tensors[name], span = _read_entry(name, entry)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"{name} starts at byte {start} of the data, but the tensors before it end at {end}")
        end = stop
    return tensors, end


def _read_entry(name: str, entry: object) -> tuple[StoredTensor, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} does not have exactly dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the dtype {str(dtype)[:40]!r}, which is unknown")
    if not _are_counts(shape) or not _are_counts(span) or len(span) != 2:
        raise ValueError(f"the shape and data_offsets of {name} are not lists of integers from 0")
    name.encode("utf-8")  # raises ValueError for half of a character, which the format's own reader refuses
    if span[1] - span[0] != prod(shape) * _BITS[dtype] // 8:
        raise ValueError(f"{name} has {span[1] - span[0]} bytes, but its shape {str(shape)[:80]} and dtype {dtype} need others")
    return StoredTensor(dtype, tuple(shape)), (span[0], span[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 53 for value in values)
