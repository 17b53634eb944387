"""Picture files, as the command line reads and writes them: colour profile and EXIF kept, 16 bits stay 16 bits.

The pipeline itself knows pictures only; this package is what stands between it and a file.
"""

from qartsr_pipeline.image_files.image_file import PictureError, PictureFile
from qartsr_pipeline.image_files.reading import READABLE_SUFFIXES, read_picture
from qartsr_pipeline.image_files.writing import WRITABLE_FORMATS, check_writable, make_folder, write_picture

__all__ = [
    "READABLE_SUFFIXES",
    "WRITABLE_FORMATS",
    "PictureError",
    "PictureFile",
    "check_writable",
    "make_folder",
    "read_picture",
    "write_picture",
]
