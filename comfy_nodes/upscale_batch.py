"""Enlarges a batch of images with a loaded model: transparency, memory, progress, and smaller tiles where memory runs out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from qartsr_pipeline.cli.messages import is_out_of_memory
from qartsr_pipeline.memory import free_main_memory

from .managed_model import ManagedModel
from .progress import TileProgress, interruptible
from .target_size import resample

SMALLER_TILES = (512, 256)  # tried in this order when a tile does not fit into memory
WORKING_COPIES = 6  # full-size float32 images that exist at once while one is blended and aligned: an estimate
WHOLE_TILE = 1024 * 1024  # pixels of the largest automatic tile


@dataclass(frozen=True)
class Enlarged:
    """What `upscale_batch` returns.

    Attributes:
        images: (B, H', W', 3). masks: (B, H', W'), 1 is transparent. Both float32 on the CPU.
        first: the first image as it came, (3 or 4, H, W).
        tiles, kernels: see `Run`.
    """

    images: torch.Tensor
    masks: torch.Tensor
    first: torch.Tensor
    tiles: tuple[int, tuple[int, int]] | None = None
    kernels: str = ""


def upscale_batch(model: ManagedModel, images: torch.Tensor, masks: torch.Tensor | None, options: dict) -> Enlarged:
    """Enlarges a batch, image by image; a factor below 1 only resamples.

    Args:
        images: float32 (B, H, W, C), 0 to 1, as ComfyUI has them.
        masks: (B or 1, h, w), 1 is transparent, or None.
        options: arguments of `QArtSRPipeline.__call__`.

    Raises:
        ValueError: images, masks or options that are not valid. MemoryError: too large for this machine.
        InterruptProcessingException: cancelled by the user.
    """
    from qartsr_pipeline.image.resize import enlarged_size
    from qartsr_pipeline.quantization.report import kernel_summary

    count, height, width = images.shape[:3]
    size = enlarged_size((height, width), options["upscale"])
    reduced = options["upscale"] < 1
    check_memory(count, (height, width), size, 1 if reduced else model.pipeline.config.scale)
    inputs = [with_alpha(image, alpha) for image, alpha in zip(images, alphas(images, masks), strict=True)]
    result = Enlarged(torch.empty(count, *size, 3), torch.zeros(count, *size), inputs[0])
    if reduced:
        for index, image in enumerate(inputs):
            put(resample(image, size), result, index)
        return result
    progress = TileProgress(count, size)
    model.bring_to_device(tile_memory(model, (height, width), options["tile_size"]))
    with model.kernels(), interruptible(model.patcher.model):
        for index, image in enumerate(inputs):
            progress.start_image(index, image)
            try:
                put(enlarge(model, image, options, progress), result, index)
            except ValueError as error:
                raise ValueError(f"image {index + 1} of {count}: {error}" if count > 1 else str(error)) from error
        kernels = kernel_summary(model.pipeline.unet, model.pipeline.vae, device=model.device.type)
    return replace(result, tiles=progress.tiles, kernels=kernels)


def put(image: torch.Tensor, result: Enlarged, index: int) -> None:
    """Stores one image, (3 or 4, H', W'), in `result`."""
    result.images[index] = image[:3].permute(1, 2, 0)
    if len(image) == 4:
        result.masks[index] = 1 - image[3]


def alphas(images: torch.Tensor, masks: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The alpha channel, (H, W), of each image, or None where it is opaque."""
    if masks is None:
        return [None] * len(images)
    masks = masks.reshape(-1, *masks.shape[-2:]).float()
    if len(masks) not in (1, len(images)):
        raise ValueError(f"mask holds {len(masks)} masks for {len(images)} images: connect one for each, or a single one.")
    masks = masks.expand(len(images), -1, -1)
    if masks.shape[1:] != images.shape[1:3]:  # Load Image gives 64 x 64 zeros for opaque images
        masks = F.interpolate(masks[:, None], size=images.shape[1:3], mode="bilinear", align_corners=False)[:, 0]
    return [1 - mask.clamp(0, 1) if bool(mask.any()) else None for mask in masks]


def with_alpha(image: torch.Tensor, alpha: torch.Tensor | None) -> torch.Tensor:
    """(H, W, C) and (H, W) -> (3 or 4, H, W) in [0, 1]. Other nodes leave values slightly outside, which are clamped; NaN stays.

    A fourth channel of the image itself is its alpha, unless a mask makes something transparent.

    Raises:
        ValueError: not 1, 3 or 4 channels.
    """
    if image.shape[-1] not in (1, 3, 4):
        raise ValueError(f"image has {image.shape[-1]} channels: expected 1 (grey), 3 (RGB) or 4 (RGB and alpha).")
    channels = image.permute(2, 0, 1).float().cpu()
    if alpha is not None:
        channels = torch.cat([channels[:3].expand(3, -1, -1), alpha[None].cpu()])
    return channels.clamp(0, 1)


def check_memory(count: int, size: tuple[int, int], enlarged: tuple[int, int], model_scale: int) -> None:
    """Raises MemoryError if the results and what is needed to compute them do not fit into main memory."""
    pixels = enlarged[0] * enlarged[1]
    working = max(pixels, size[0] * size[1] * model_scale**2)
    needed = 16 * count * pixels + 12 * WORKING_COPIES * working
    free = free_main_memory()
    if needed > free:
        raise MemoryError(
            f"{count} x {enlarged[1]} x {enlarged[0]} pixels need about {needed / 1e9:.1f} GB of main memory,"
            f" and {free / 1e9:.1f} GB are free. Choose a smaller size, or fewer images at once."
        )


def tile_memory(model: ManagedModel, size: tuple[int, int], tile_size: int | None) -> int:
    """Bytes that one pass of the network needs at most, for ComfyUI to free them."""
    from qartsr_pipeline.image.tiles import USABLE_SHARE, bytes_per_pixel
    from qartsr_pipeline.overflow import compute_dtype
    from qartsr_pipeline.video import causal_vae

    whole = size[0] * size[1] * model.pipeline.config.scale**2
    pixels = min(whole, tile_size**2) if tile_size else min(whole, WHOLE_TILE)
    vae = model.pipeline.vae
    per_pixel = causal_vae.bytes_per_pixel if model.for_clips else bytes_per_pixel
    return int(pixels * per_pixel(vae, compute_dtype(vae).itemsize) / USABLE_SHARE)


def enlarge(model: ManagedModel, image: torch.Tensor, options: dict, progress: TileProgress) -> torch.Tensor:
    """One image (C, H, W) -> (3 or 4, H', W'), in smaller tiles when memory runs out and the tile size is automatic."""
    from comfy import model_management

    asked, draw = options["tile_size"], options["generator"].get_state()
    tried = asked
    while True:
        options["generator"].set_state(draw)  # every attempt draws the same numbers
        try:
            call = options | {"tile_size": tried}
            return model.pipeline(image, output_type="pt", callback_on_step_end=progress, **call).images[0]
        except (model_management.OOM_EXCEPTION, MemoryError, RuntimeError) as error:
            if not isinstance(error, model_management.OOM_EXCEPTION) and not is_out_of_memory(error):
                raise
        largest = tried or automatic_tile(model, image, options["tile_overlap"])
        model_management.soft_empty_cache()  # only now is the memory of the failed call free
        tried = None if asked else smaller_tile(largest, options["tile_overlap"])
        if tried is None:
            raise MemoryError(
                f"memory ran out on {model.device} with tiles of {largest} pixels. Choose a smaller tile_size, or unload other"
                " models."
            )


def automatic_tile(model: ManagedModel, image: torch.Tensor, overlap: int | None) -> int:
    """Longest side of the tiles that are chosen automatically for an image (C, H, W)."""
    from qartsr_pipeline.image.conversion import to_images

    grid = model.pipeline.plan(to_images(image)[0], None, overlap).grid
    return max(grid.tile_height, grid.tile_width)


def smaller_tile(largest: int, overlap: int | None) -> int | None:
    """The next of `SMALLER_TILES` below `largest` and above the overlap, or None."""
    return next((side for side in SMALLER_TILES if (overlap or 0) < side < largest), None)
