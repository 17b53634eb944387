"""QArtSR Upscale: enlarges images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from qartsr_pipeline.cli.messages import is_out_of_memory
from qartsr_pipeline.memory import free_main_memory

from .load_model import CATEGORY, QArtSRModel, found_by
from .managed_model import ManagedModel
from .progress import TileProgress, interruptible

COLOR_FIXES = ("wavelet", "adain", "none")
LARGEST_SCALE = 8
SMALLER_TILES = (512, 256)  # tried in this order when a tile does not fit into memory
WORKING_COPIES = 6  # full-size float32 images that exist at once while one is blended and aligned: an estimate
WHOLE_TILE = 1024 * 1024  # pixels of the largest automatic tile


class QArtSRUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRUpscale",
            display_name="QArtSR Upscale",
            category=CATEGORY,
            description="Enlarges images in tiles with a QArtSR model.",
            **found_by("QArtSR", "upscale", "upscaler", "super resolution", "enhance", "enlarge", "4x", "restore details"),
            inputs=[
                QArtSRModel.Input("model", tooltip="From QArtSR Load Model."),
                io.Image.Input("image", tooltip="One image, or a batch of images of one size."),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=1.0,
                    max=float(LARGEST_SCALE),
                    step=0.05,
                    tooltip="How many times as wide and high the result is. The model works at its own scale; other results are"
                    " resampled from that.",
                ),
                io.Int.Input(
                    "long_side",
                    default=0,
                    min=0,
                    max=65536,
                    step=1,
                    tooltip="Pixels of the result's longer side; scale then has no effect. 0: use scale.",
                ),
                io.Int.Input(
                    "tile_size",
                    default=0,
                    min=0,
                    max=8192,
                    step=64,
                    tooltip="Longest side of a tile in pixels, at the model's scale. Smaller tiles need less memory, more time."
                    " 0: by free memory.",
                ),
                io.Int.Input(
                    "tile_overlap",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="How far neighbouring tiles overlap at least, in the same pixels. 0: automatic, at most a"
                    " quarter of the tile.",
                ),
                io.Combo.Input(
                    "color_fix",
                    options=list(COLOR_FIXES),
                    default=COLOR_FIXES[0],
                    tooltip="Aligns the result's colours to the image's: wavelet by low frequencies, adain by mean and contrast"
                    " of each channel; none leaves the model's own.",
                ),
                io.Boolean.Input(
                    "sample_posterior",
                    default=False,
                    tooltip="Off: nothing is random. On: a random draw, which the seed decides. With tile_size 0 free memory"
                    " decides the tiles, which show a little.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Only matters when sample_posterior is on.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Transparency, as Load Image gives it: 1 is transparent. One for all images, or one for each.",
                ),
            ],
            outputs=[
                io.Image.Output(id="images", display_name="image"),
                io.Mask.Output(id="masks", display_name="mask", tooltip="The enlarged transparency; 0 (opaque) without a mask."),
            ],
        )

    @classmethod
    def validate_inputs(cls, color_fix: str | None = None) -> bool | str:
        """True, or what is wrong, before anything runs. A connected or missing input is None here."""
        return color_fix in (None, *COLOR_FIXES) or f"color_fix {color_fix!r} is none of {', '.join(COLOR_FIXES)}."

    @classmethod
    def execute(
        cls,
        model: ManagedModel,
        image: torch.Tensor,
        scale: float,
        long_side: int,
        tile_size: int,
        tile_overlap: int,
        color_fix: str,
        sample_posterior: bool,
        seed: int,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        factor = enlargement(image.shape[1:3], scale, long_side)
        options = {
            "upscale": factor,
            "tile_size": tile_size or None,
            "tile_overlap": tile_overlap or None,
            "color_fix": None if color_fix == "none" else color_fix,
            "sample_posterior": sample_posterior,
            "generator": torch.Generator().manual_seed(seed),
        }
        images, masks = upscale_batch(model, image, mask, options)
        return io.NodeOutput(images, masks)


def enlargement(size: tuple[int, int], scale: float, long_side: int) -> float:
    """The factor for images of (height, width).

    Raises:
        ValueError: outside of 1 to `LARGEST_SCALE` times; the message says what is possible.
    """
    if not long_side:
        factor, asked = scale, f"scale {scale:g}"
    else:
        factor = long_side / max(size)
        asked = f"long_side {long_side}, which is {factor:.3g} times the image's {max(size)} pixels,"
    if not 1 <= factor <= LARGEST_SCALE:
        possible = f"long_side from {max(size)} to {max(size) * LARGEST_SCALE}" if long_side else f"1 to {LARGEST_SCALE}"
        raise ValueError(
            f"{asked} is not possible: choose {possible}. For more, connect a second QArtSR Upscale behind this one."
        )
    return factor


def upscale_batch(
    model: ManagedModel, images: torch.Tensor, masks: torch.Tensor | None, options: dict
) -> tuple[torch.Tensor, torch.Tensor]:
    """Enlarges a batch, image by image.

    Args:
        images: float32 (B, H, W, C), 0 to 1, as ComfyUI has them.
        masks: (B or 1, h, w), 1 is transparent, or None.
        options: arguments of `QArtSRPipeline.__call__`.

    Returns:
        Images (B, H', W', 3) and masks (B, H', W'), float32 on the CPU.

    Raises:
        ValueError: images, masks or options that are not valid. MemoryError: too large for this machine.
        InterruptProcessingException: cancelled by the user.
    """
    from qartsr_pipeline.image.resize import enlarged_size

    count, height, width = images.shape[:3]
    size = enlarged_size((height, width), options["upscale"])
    check_memory(count, (height, width), size, model.pipeline.config.scale)
    inputs = [with_alpha(image, alpha) for image, alpha in zip(images, alphas(images, masks), strict=True)]
    result, transparency = torch.empty(count, *size, 3), torch.zeros(count, *size)
    progress = TileProgress(count)
    model.bring_to_device(tile_memory(model, (height, width), options["tile_size"]))
    with model.kernels(), interruptible(model.patcher.model):
        for index, image in enumerate(inputs):
            progress.start_image(index, image)
            try:
                enlarged = enlarge(model, image, options, progress)
            except ValueError as error:
                raise ValueError(f"image {index + 1} of {count}: {error}" if count > 1 else str(error)) from error
            result[index] = enlarged[:3].permute(1, 2, 0)
            if len(enlarged) == 4:
                transparency[index] = 1 - enlarged[3]
    return result, transparency


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
            f" and {free / 1e9:.1f} GB are free. Choose a smaller scale or long_side, or fewer images at once."
        )


def tile_memory(model: ManagedModel, size: tuple[int, int], tile_size: int | None) -> int:
    """Bytes that one pass of the network needs at most, for ComfyUI to free them."""
    from qartsr_pipeline.image.tiles import USABLE_SHARE, bytes_per_pixel
    from qartsr_pipeline.overflow import compute_dtype

    whole = size[0] * size[1] * model.pipeline.config.scale**2
    pixels = min(whole, tile_size**2) if tile_size else min(whole, WHOLE_TILE)
    vae = model.pipeline.vae
    return int(pixels * bytes_per_pixel(vae, compute_dtype(vae).itemsize) / USABLE_SHARE)


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
