"""QArtSR Load Folder: loads the images of a folder, of any sizes, one by one for the nodes that follow."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from comfy_api.latest import io

from qartsr_pipeline.memory import free_main_memory

from .load_model import CATEGORY, found_by
from .model_folders import typed_path

if TYPE_CHECKING:
    from qartsr_pipeline.image_files.listing import Listing

BYTES_PER_PIXEL = 16  # float32, three channels and the mask


class QArtSRLoadFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRLoadFolder",
            display_name="QArtSR Load Folder",
            category=CATEGORY,
            description="Loads the images of a folder, which may have different sizes. The nodes that follow run for one after"
            " another.",
            **found_by("load images", "image folder", "batch", "frames"),
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Absolute, or below ComfyUI's input folder. Folders within it are not searched.",
                ),
                io.Int.Input("first", default=0, min=0, max=1_000_000, tooltip="So many images, by name, are skipped."),
                io.Int.Input("limit", default=0, min=0, max=1_000_000, tooltip="So many images at most. 0: all."),
                io.Boolean.Input(
                    "as_batch",
                    default=False,
                    optional=True,  # workflows from before it was there do not have it
                    tooltip="On: all images as one batch, such as the frames of a film; nodes that follow run once. They must"
                    " have one size, and the name is the folder's.",
                ),
            ],
            outputs=[
                io.Image.Output(id="images", display_name="image", is_output_list=True, tooltip="One image after another."),
                io.Mask.Output(
                    id="masks", display_name="mask", is_output_list=True, tooltip="Their transparency: 1 is transparent."
                ),
                io.String.Output(
                    id="names",
                    display_name="name",
                    is_output_list=True,
                    tooltip="Their file names without suffix, for the prefix of Save Image.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool | str:
        """True, or what is wrong, before anything runs. A connected or missing input is None here."""
        if folder is not None and not folder.strip():
            return "folder is empty: give a folder of images, absolute or below ComfyUI's input folder."
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str | None = None, **others: object) -> Any:
        """Changes when the folder's images do."""
        try:
            return [(path.name, path.stat().st_mtime_ns) for path in listing_of(folder).images] if folder else None
        except (ValueError, OSError):
            return None

    @classmethod
    def execute(cls, folder: str, first: int, limit: int, as_batch: bool = False) -> io.NodeOutput:
        listing = listing_of(folder)
        paths = listing.images[first:][: limit or None]
        if listing.left_out():
            logging.info("QArtSR Load Folder: %s", listing.left_out())
        if not paths:
            raise ValueError(f"{folder} has no image after the first {first}: choose a smaller `first`.")
        loaded = load(paths)
        if not loaded:
            raise ValueError(f"none of the {len(paths)} images of {folder} can be read; the log says why.")
        names, images, masks = zip(*loaded, strict=True)
        if as_batch:
            check_one_size(names, images)
            return io.NodeOutput([torch.cat(images)], [torch.cat(masks)], [paths[0].parent.name])
        return io.NodeOutput(list(images), list(masks), list(names))


def check_one_size(names: Sequence[str], images: Sequence[torch.Tensor]) -> None:
    """Raises ValueError unless all images (1, H, W, 3) have the size of the first; the message names one that has not."""
    for name, image in zip(names, images, strict=True):
        if image.shape != images[0].shape:
            (_, height, width, _), (_, first_height, first_width, _) = image.shape, images[0].shape
            raise ValueError(
                f"{name} has {width} x {height} pixels, and {names[0]} {first_width} x {first_height}: a batch has one size."
                " Switch as_batch off, and the images come one after another."
            )


def listing_of(folder: str) -> Listing:
    """The image files of a folder, sorted by name, and what else is in it.

    Raises:
        ValueError: not a folder, or no images in it.
    """
    import folder_paths

    from qartsr_pipeline.image_files.listing import READABLE_SUFFIXES, list_images

    path = typed_path(folder, folder_paths.get_input_directory())
    if not path.is_dir():
        raise ValueError(f"{path} is a file: give the folder that it is in.")
    listing = list_images(path)
    if not listing.images:
        raise ValueError(f"{path} holds no images ({', '.join(READABLE_SUFFIXES)}). Folders within it are not searched.")
    return listing


def load(paths: list[Path]) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, image (1, H, W, 3) and mask (1, H, W) of every file; a file that cannot be read is logged and skipped.

    Raises:
        MemoryError: together they do not fit into main memory.
    """
    from comfy.utils import ProgressBar

    from qartsr_pipeline.image_files import ImageFileError, read_image

    loaded, bar = [], ProgressBar(len(paths))
    for done, path in enumerate(paths, 1):
        try:
            pixels = read_image(path).pixels
        except ImageFileError as error:
            logging.warning("QArtSR Load Folder: %s", error)
        else:
            check_memory(pixels.shape[:2], done, len(paths))
            loaded.append((path.stem, *as_image_and_mask(pixels)))
        bar.update_absolute(done)
    return loaded


def check_memory(size: tuple[int, int], number: int, count: int) -> None:
    free = free_main_memory()
    if size[0] * size[1] * BYTES_PER_PIXEL > free / 2:
        raise MemoryError(
            f"main memory is full with image {number} of {count} ({free / 1e9:.1f} GB are free). Load fewer at once with"
            " `limit`, and go on with `first`; or use the command `qartsr upscale FOLDER -o RESULTS`."
        )


def as_image_and_mask(pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(H, W, 1 to 4) of 8 or 16 bits -> (1, H, W, 3) and (1, H, W) in [0, 1]; without alpha the mask is 0."""
    from qartsr_pipeline.image.conversion import to_images

    image = to_images(pixels)[0]
    mask = torch.zeros(1, *pixels.shape[:2]) if image.alpha is None else 1 - image.alpha[:, 0]
    return image.rgb.permute(0, 2, 3, 1).contiguous(), mask
