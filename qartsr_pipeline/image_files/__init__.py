"""Image files, as the command line reads and writes them: colour profile and EXIF are kept, 16 bits stay 16 bits.

The pipeline itself takes and returns images in memory. Nothing here imports torch.
"""

from qartsr_pipeline.image_files.image_file import ImageFile, ImageFileError
from qartsr_pipeline.image_files.reading import READABLE_SUFFIXES, read_image
from qartsr_pipeline.image_files.writing import (
    DEFAULT_QUALITY,
    WRITABLE_FORMATS,
    check_writable,
    make_folder,
    write_image,
    write_whole,
)

__all__ = [
    "DEFAULT_QUALITY",
    "READABLE_SUFFIXES",
    "WRITABLE_FORMATS",
    "ImageFileError",
    "ImageFile",
    "check_writable",
    "make_folder",
    "read_image",
    "write_image",
    "write_whole",
]
