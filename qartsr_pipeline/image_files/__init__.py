"""Image files, as the command line reads and writes them: metadata are kept, 16 bits stay 16 bits, what is lost is said.

The pipeline itself takes and returns images in memory. Nothing here imports torch.
"""

from qartsr_pipeline.image_files.image_file import ImageFile, ImageFileError, Metadata
from qartsr_pipeline.image_files.listing import list_images
from qartsr_pipeline.image_files.reading import READABLE_SUFFIXES, read_image, read_size
from qartsr_pipeline.image_files.writing import (
    DEFAULT_QUALITY,
    WRITABLE_FORMATS,
    check_writable,
    write_image,
)

__all__ = [
    "DEFAULT_QUALITY",
    "READABLE_SUFFIXES",
    "WRITABLE_FORMATS",
    "ImageFileError",
    "ImageFile",
    "Metadata",
    "check_writable",
    "list_images",
    "read_image",
    "read_size",
    "write_image",
]
