"""Reading an image file: pixels and metadata; every way in which a file can be bad has a message.

Damaged metadata does not make a sound image unreadable: they are left out, with a notice.
"""

from __future__ import annotations

import io
import mmap
import os
import stat
import struct
import warnings
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError

from qartsr_pipeline.image_files import exif, png
from qartsr_pipeline.image_files.image_file import ImageFile, ImageFileError, Metadata
from qartsr_pipeline.image_files.metadata import turn_upright
from qartsr_pipeline.image_files.pixels import UnreadablePixels, read_pixels, with_transparent_value

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF_SUFFIXES: tuple[str, ...] = ()
else:
    register_heif_opener()
    HEIF_SUFFIXES = (".heic", ".heif", ".hif")

# What is looked for in a folder. A file that is named may be anything that Pillow opens.
READABLE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".tif", ".tiff", ".bmp", ".dib", ".gif", ".apng"),
    *(".jp2", ".j2k", ".j2c", ".jpx", ".jpf", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi"),
    *((".avif",) if ".avif" in Image.registered_extensions() else ()),
    *HEIF_SUFFIXES,
)
# What Pillow reports broken content with.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, KeyError, TypeError, IndexError, OverflowError, struct.error)
_IPTC, _CLIPPING_PATHS = 0x0404, range(0x07D0, 0x0BB7)  # Photoshop's numbers for what it stores in a file
_TIFF_XMP, _TIFF_IPTC, _TIFF_ICC, _SAMPLES_PER_PIXEL = 700, 33723, 34675, 277
# What a TIFF file's directory holds besides its structure and a description of the photograph, and must not go unmentioned.
_TIFF_LOST = {
    301: "the transfer function, so that colours may look different",
    319: "the primary colours, so that colours may look different",
    33550: "the scale on a map (GeoTIFF)",
    33922: "the place on a map (GeoTIFF)",
    34377: "Photoshop's own data",
    37724: "Photoshop's layers",
    50839: "ImageJ's own data",
}


def read_image(path: str | os.PathLike) -> ImageFile:
    """Reads an image file and turns it upright. Of several frames or pages the first is read, with a notice.

    Raises:
        ImageFileError: no such file, a folder, no permission, not an image, truncated or damaged, implausibly large, values
            whose range is not known.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ImageFileError(f"{path} is a folder, not an image. Give an image file.")
        if not stat.S_ISREG(mode):  # a pipe would be waited for without end
            raise ImageFileError(f"{path} is a pipe or a device, not a file. Save the image to a file first.")
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # about metadata, which are checked here
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _read(path, file)
    except ImageFileError:
        raise
    except UnreadablePixels as error:
        raise ImageFileError(f"{path} {error}") from error
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
        way = "pip install 'qartsr[heif]', or convert it" if _looks_like_heif(path) else "Convert it to PNG or JPEG"
        raise ImageFileError(
            f"{path} is not an image, or in a form that Pillow {Image.__version__} does not read. {way}."
        ) from error
    except _DAMAGE as error:
        if "unknown raw mode" in str(error):
            raise ImageFileError(
                f"{path} stores its channels in a way that Pillow {Image.__version__} does not read. Convert it to PNG."
            ) from error
        raise ImageFileError(f"{path} is truncated or damaged ({error}). Copy or download it again.") from error


def read_size(path: str | os.PathLike) -> tuple[int, int] | None:
    """(height, width) as the file's header says, not turned upright; None where it cannot be read as an image."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")
            return image.height, image.width
    except _DAMAGE:
        return None


def _looks_like_heif(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(12)[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypmsf1")


def _read(path: Path, file: BinaryIO) -> ImageFile:
    parts = png.take_apart(file.read()) if file.read(8) == png.SIGNATURE and not file.seek(0) else None
    file.seek(0)

    def reopen() -> Image.Image:
        # Never by its path: Pillow maps uncompressed files into memory then, and shears TIFF files that lie on their side.
        image = Image.open(io.BytesIO(parts.pixels) if parts else open(path, "rb"))
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            image.info.pop("xmp", None)  # is read from the directory; Pillow 11.0 fails when it turns an image with XMP
        return image

    with reopen() as image:
        frames = parts.frames if parts else getattr(image, "n_frames", 1)
        metadata, turn, problems = _metadata_of_png(parts) if parts else _metadata(image, file)
        samples = image.tag_v2.get(_SAMPLES_PER_PIXEL, 1) if isinstance(image, TiffImagePlugin.TiffImageFile) else 0
        bands = len(image.getbands())
        # Loading exchanges the sides of TIFF files, so everything about how it is stored has been read before.
        pixels, in_profile, notices = read_pixels(image, reopen, file)
    if parts and parts.transparency:
        pixels = with_transparent_value(pixels, parts.transparency, parts.depth)
    if not in_profile:
        metadata = replace(metadata, icc_profile=None)
    notices = [f"{path.name} {notice}" for notice in notices]
    further = samples - (pixels.shape[2] if in_profile else bands)
    if further > 0:
        notices.append(f"{path.name} has {further} more {'channel' if further == 1 else 'channels'}, such as a mask; left out.")
    if frames > 1:
        notices.append(f"{path.name} has {frames} frames or pages; only the first is read.")
    if problems:
        notices.append(f"{path.name}: left out, because it cannot be taken over: {'; '.join(problems)}.")
    return ImageFile(turn_upright(pixels, turn), metadata, notices)


def _metadata_of_png(parts: png.PngFile) -> tuple[Metadata, int, list[str]]:
    """The metadata, the orientation that is still to be applied, and what cannot be taken over."""
    metadata = Metadata(**parts.metadata, resolution=parts.resolution, png_chunks=tuple(parts.chunks))
    upright, turn, problems = _upright(metadata)
    return upright, turn, parts.problems + problems


def _metadata(image: Image.Image, file: BinaryIO) -> tuple[Metadata, int, list[str]]:
    """As `_metadata_of_png`, for other formats."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _metadata_of_tiff(image, file)
    info, problems = image.info, []
    metadata = Metadata(
        icc_profile=info.get("icc_profile") or None,
        exif=info.get("exif") or None,
        xmp=_bytes(info.get("xmp")),
        comment=_bytes(info.get("comment")),
        resolution=None if isinstance(image, JpegImagePlugin.JpegImageFile) else _positive(info.get("dpi")),
    )
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        photoshop = info.get("photoshop", {})
        unit = {1: 1.0, 2: 2.54}.get(info.get("jfif_unit", 0))
        # Not "dpi": Pillow makes that up where there is none.
        density = tuple(value * unit for value in info["jfif_density"]) if unit else None
        metadata = replace(metadata, iptc=photoshop.get(_IPTC), resolution=_positive(density))
        if any(number in _CLIPPING_PATHS for number in photoshop):
            problems.append("Photoshop's clipping paths")
        if any(name == "APP11" and b"jumb" in content[:64] for name, content in image.applist):
            problems.append("the content credentials (C2PA) do not hold for a changed image")
        if metadata.xmp and b"HasExtendedXMP" in metadata.xmp:
            problems.append("the second part of the XMP data")
    elif image.format == "JPEG2000":
        file.seek(0)
        if b"uuid" in file.read(1 << 16):
            problems.append("the EXIF and XMP data, which Pillow does not read from JPEG 2000")
    upright, turn, more = _upright(metadata)
    return upright, turn, problems + more


def _metadata_of_tiff(image: TiffImagePlugin.TiffImageFile, file: BinaryIO) -> tuple[Metadata, int, list[str]]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            directories = exif.Directories(mapped)
            tags = directories.read(directories.first)
            block = exif.block_of_tiff(directories, tags)
        except exif.ExifError as error:  # Pillow is more patient
            return Metadata(icc_profile=image.info.get("icc_profile")), 1, [f"the metadata are damaged ({error})"]
    values = {tag.number: tag.data for tag in tags}
    lost = [number for number in _TIFF_LOST if number in values]
    # A profile says the same as the two first ones, and is taken over.
    problems = [_TIFF_LOST[number] for number in lost if number not in (301, 319) or _TIFF_ICC not in values]
    metadata = Metadata(
        icc_profile=values.get(_TIFF_ICC),
        exif=block,
        xmp=values.get(_TIFF_XMP),
        iptc=values.get(_TIFF_IPTC),
        resolution=exif.resolution_of(tags, directories.order),
    )
    upright, _, more = _upright(metadata)
    return upright, 1, problems + more  # Pillow turns TIFF files while it loads them


def _upright(metadata: Metadata) -> tuple[Metadata, int, list[str]]:
    """The metadata of an upright image, the orientation that they had, and problems."""
    if metadata.xmp:
        metadata = replace(metadata, xmp=exif.upright_xmp(metadata.xmp))
    if not metadata.exif:
        return metadata, 1, []
    try:
        block, turn = exif.upright(metadata.exif)
        resolution = metadata.resolution or exif.resolution(block)
    except exif.ExifError as error:
        return replace(metadata, exif=None), 1, [f"the EXIF data are damaged ({error})"]
    return replace(metadata, exif=block, resolution=resolution), turn, []


def _bytes(value: object) -> bytes | None:
    return (value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else None) or None


def _positive(pair: object) -> tuple[float, float] | None:
    if not isinstance(pair, tuple) or len(pair) != 2:
        return None
    x, y = float(pair[0]), float(pair[1])
    return (x, y) if x > 0 and y > 0 else None
