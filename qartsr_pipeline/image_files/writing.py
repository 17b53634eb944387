"""Writing a picture file: whole or not at all, in the format that its name asks for."""

from __future__ import annotations

import errno
import io
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from qartsr_pipeline.image.pil_modes import LUMA
from qartsr_pipeline.image_files.encoding import encode_png, encode_tiff
from qartsr_pipeline.image_files.image_file import PictureError, PictureFile
from qartsr_pipeline.image_files.metadata import exif_for_size

_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows knows no quotas


@dataclass(frozen=True)
class _Format:
    name: str
    alpha: bool = False
    sixteen_bit: bool = False
    metadata: bool = True
    largest_side: int = 2**31 - 1
    options: tuple[tuple[str, object], ...] = ()


_JPEG = _Format("JPEG", largest_side=65500, options=(("quality", 95), ("subsampling", 0)))
_TIFF = _Format("TIFF", alpha=True, sixteen_bit=True)
WRITABLE_FORMATS = {
    ".png": _Format("PNG", alpha=True, sixteen_bit=True),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _Format("WebP", alpha=True, largest_side=16383, options=(("quality", 95), ("method", 4))),
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _Format("BMP", metadata=False),
}


def make_folder(folder: str | os.PathLike) -> None:
    """Creates the folder and those above it where missing; raises PictureError with the reason where that fails."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise PictureError(f"The folder {folder} cannot be created: {reason}. Choose another one, or check the names.") from error


def check_writable(path: str | os.PathLike, size: tuple[int, int] | None = None) -> None:
    """What can be said before the pixels exist: the format is known and holds `size` (width, height), the folder takes files.

    Raises:
        PictureError: with the reason and the ways out. Nothing is left behind.
    """
    path = Path(path)
    kind = _format_of(path)
    if size is not None and max(size) > kind.largest_side:
        raise PictureError(
            f"{path} would have {size[0]} x {size[1]} pixels, but {kind.name} holds at most {kind.largest_side} a side."
            " Write a .png or .tif."
        )
    _write_whole(path, lambda file: None, keep=False)


def write_picture(path: str | os.PathLike, pixels: np.ndarray, source: PictureFile) -> list[str]:
    """Writes a result with the bits, colour profile and EXIF of the file it was made from.

    Args:
        path: its suffix chooses the format, see `WRITABLE_FORMATS`. An existing file is replaced, in one step.
        pixels: (H, W, 3) or (H, W, 4) float in [0, 1]; values outside are clipped. Grey again if `source` is grey.
        source: the picture file that was read.

    Returns:
        What the format could not hold, one sentence each, for the user to see: alpha is laid over white, 16 bits become 8.

    Raises:
        PictureError: unknown suffix, too many pixels for the format, folder missing or not writable, disk full. Whatever the
            failure, no half-written file remains and an existing one is untouched.
    """
    path = Path(path)
    kind = _format_of(path)
    pixels, notices = _fitted(pixels, source, kind)
    height, width = pixels.shape[:2]
    if max(width, height) > kind.largest_side:
        check_writable(path, (width, height))
    icc_profile, exif = source.icc_profile, exif_for_size(source.exif, width, height)
    if not kind.metadata and (icc_profile or exif):
        notices.append(f"{path.name}: {kind.name} holds no colour profile and no EXIF; they are left out.")
        icc_profile = exif = None
    _write_whole(path, lambda file: _encode(file, pixels, kind, icc_profile, exif))
    return notices


def _format_of(path: Path) -> _Format:
    kind = WRITABLE_FORMATS.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{path} ends in no known picture format. Use one of {', '.join(WRITABLE_FORMATS)}.")
    return kind


def _fitted(pixels: np.ndarray, source: PictureFile, kind: _Format) -> tuple[np.ndarray, list[str]]:
    """(H, W, C) float -> uint8 or uint16 in channels that the format has, and what was lost."""
    notices = []
    colour, alpha = np.clip(pixels[..., :3], 0, 1), np.clip(pixels[..., 3:], 0, 1)
    if alpha.shape[-1] and not kind.alpha:
        notices.append(f"{kind.name} holds no transparency; it is laid over white. Write a .png to keep it.")
        colour, alpha = colour * alpha + (1 - alpha), alpha[..., :0]
    if source.pixels.shape[2] <= 2:
        colour = (colour @ np.array(LUMA, np.float32))[..., None]
    sixteen_bit = source.sixteen_bit and kind.sixteen_bit
    if source.sixteen_bit and not sixteen_bit:
        notices.append(f"{kind.name} holds 8 bits, the source has 16. Write a .png or .tif to keep them.")
    values = np.concatenate([colour, alpha], axis=-1)
    return np.rint(values * (65535 if sixteen_bit else 255)).astype(np.uint16 if sixteen_bit else np.uint8), notices


def _encode(file: BinaryIO, pixels: np.ndarray, kind: _Format, icc_profile: bytes | None, exif: bytes | None) -> None:
    if kind.name == "TIFF" or pixels.dtype == np.uint16:
        encode = encode_tiff if kind.name == "TIFF" else encode_png
        file.write(encode(pixels, icc_profile, exif))
        return
    metadata = {name: value for name, value in (("icc_profile", icc_profile), ("exif", exif)) if value}
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    # Not straight into the file: Pillow's encoders take a short write, as on a full disk, for a whole one.
    encoded = io.BytesIO()
    image.save(encoded, kind.name, **metadata, **dict(kind.options))
    file.write(encoded.getbuffer())


def _write_whole(path: Path, write: Callable[[BinaryIO], None], keep: bool = True) -> None:
    """Writes to a temporary name in the same folder and renames it when everything has reached the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep:
            os.replace(temporary, path)
    except OSError as error:
        raise PictureError(f"{path} cannot be written: {_reason(error, path.parent)}") from error
    except ValueError as error:  # an encoder's refusal, such as EXIF beyond JPEG's 64 kB
        raise PictureError(f"{path} cannot be written in this format: {error}. Write a .png or .tif.") from error
    finally:
        # The folder may be the very thing that does not work.
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass


def _reason(error: OSError, folder: Path) -> str:
    if error.errno in _FULL:
        return "the disk is full or a size limit is reached. Nothing was left behind. Free some space or choose another folder."
    if error.errno == errno.ENOENT:
        return f"the folder {folder} does not exist. Create it or choose another one."
    if error.errno == errno.ENOTDIR:
        return f"{folder} is not a folder. Choose another one."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"the folder {folder} may not be written to. Choose another one, or change its permissions."
    return f"{error.strerror or error}. Choose another name or folder."
