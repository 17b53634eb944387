"""Reading an image file: pixels, colour profile, EXIF; every way in which a file can be bad has a message."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from qartsr_pipeline.image import plain_mode
from qartsr_pipeline.image_files.image_file import ImageFile, ImageFileError
from qartsr_pipeline.image_files.metadata import kept_exif, orientation, turn_upright
from qartsr_pipeline.image_files.sixteen_bits import is_sixteen_bit, read_sixteen_bits

# What is looked for in a folder. A file that is named may be anything that Pillow opens.
READABLE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


def read_image(path: str | os.PathLike) -> ImageFile:
    """Reads an image file and turns it upright. Of several frames or pages the first is read, with a notice.

    Raises:
        ImageFileError: no such file, a folder, no permission, not an image, truncated or damaged, implausibly large.
    """
    path = Path(path)
    if path.is_dir():
        raise ImageFileError(f"{path} is a folder, not an image. Give an image file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _read(path, image)
    except FileNotFoundError as error:
        raise ImageFileError(f"There is no file {path}. Check the name and the folder you are in ({Path.cwd()}).") from error
    except PermissionError as error:
        raise ImageFileError(f"{path} may not be read: permission denied. Change its permissions, or copy it.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = Image.MAX_IMAGE_PIXELS
        raise ImageFileError(
            f"{path} claims more than {limit} pixels, which is how decompression bombs look. Cut the image into parts first."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageFileError(f"{path} is not an image, or in a format that Pillow {Image.__version__} does not read.") from error
    except ImageFileError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        # Pillow reports broken content with any of these.
        raise ImageFileError(f"{path} is truncated or damaged ({error}). Copy or download it again.") from error


def _read(path: Path, image: Image.Image) -> ImageFile:
    frames = getattr(image, "n_frames", 1)
    notices = [f"{path.name} has {frames} frames or pages; only the first is read."] if frames > 1 else []
    icc_profile = image.info.get("icc_profile")
    sixteen_bit = is_sixteen_bit(image)
    pixels = read_sixteen_bits(path, image) if sixteen_bit else None
    if pixels is None:
        if sixteen_bit:
            notices.append(f"{path.name} stores its 16 bits in a way that can only be read at 8 bits.")
        pixels, icc_profile = _read_eight_bits(path, image, icc_profile)
    # Only now: asking a PNG for its EXIF loads it, and how it is stored is forgotten then.
    return ImageFile(turn_upright(pixels, orientation(image)), icc_profile, kept_exif(image), notices)


def _read_eight_bits(path: Path, image: Image.Image, icc_profile: bytes | None) -> tuple[np.ndarray, bytes | None]:
    if image.mode in ("F", "I"):
        kind = "floating-point" if image.mode == "F" else "32-bit"
        raise ImageFileError(f"{path} holds {kind} values, whose range is not defined. Convert it to a 16-bit image.")
    image.load()
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"):
        # CMYK, Lab and the like: their profile does not describe the RGB values that come out.
        image, icc_profile = _to_srgb(image, icc_profile), None
    pixels = np.asarray(image.convert(plain_mode(image)))
    return pixels.reshape(*pixels.shape[:2], -1), icc_profile


def _to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    if icc_profile:
        try:
            profiles = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
            if converted is not None:  # None is for conversions in place
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile of another colour space or a broken one: the plain conversion below is what viewers do, too
    return image.convert("RGB")
