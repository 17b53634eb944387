"""QArtSR Upscale: enlarges images."""

from __future__ import annotations

import time

import torch
from comfy_api.latest import io

from .load_model import CATEGORY, QArtSRModel, advanced, found_by
from .managed_model import ManagedModel
from .run_summary import PeakMemory, Run, save_pair
from .target_size import BY_SCALE, LARGEST_SCALE, SIZES, Sizing
from .upscale_batch import upscale_batch

COLOR_FIXES = ("wavelet", "adain", "none")


class QArtSRUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRUpscale",
            display_name="QArtSR Upscale",
            category=CATEGORY,
            description="Enlarges images, adding detail, with a QArtSR model. Shows before and after when it is done.",
            **found_by(
                *("QArtSR", "upscale", "upscaler", "image upscale", "super resolution", "enhance", "enlarge", "4x", "2x"),
                *("restore details", "hires fix"),
            ),
            inputs=[
                QArtSRModel.Input("model", tooltip="From QArtSR Load Model."),
                io.Image.Input("image", tooltip="One image, or a batch of images of one size."),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=1.0,
                    max=float(LARGEST_SCALE),
                    step=0.05,
                    tooltip="How many times as wide and high the result is. The model always works at its own scale, 4 times, and"
                    " the result is resampled from that: 2 takes as long as 4. Only used while `size` says so.",
                ),
                io.Int.Input(
                    "long_side",
                    default=0,
                    min=0,
                    max=65536,
                    step=1,
                    tooltip="Pixels of the result's longer side, in place of scale. 0: use scale. Only used while `size` says"
                    " so.",
                ),
                advanced(
                    io.Int.Input(
                        "tile_size",
                        default=0,
                        min=0,
                        max=8192,
                        step=64,
                        tooltip="Large images are worked on in overlapping tiles. This is the longest side of one in pixels, at 4"
                        " times the image's size. Smaller tiles need less memory and more time. 0: by free memory.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "tile_overlap",
                        default=0,
                        min=0,
                        max=4096,
                        step=16,
                        tooltip="How far tiles overlap at least, in the same pixels. 0: automatic, at most a quarter of a tile.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "color_fix",
                        options=list(COLOR_FIXES),
                        default=COLOR_FIXES[0],
                        tooltip="Keeps the image's colours. wavelet: place by place, the safest. adain: brightness and contrast"
                        " of the image as a whole. none: the model's own, which drift from image to image. Every image of a"
                        " batch is compared with itself only, which also keeps frames of a clip steady.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "sample_posterior",
                        display_name="add variation",
                        default=False,
                        tooltip="On: fine detail comes out a little differently with every seed. Off: always the same image.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "seed",
                        default=0,
                        min=0,
                        max=2**53 - 1,
                        control_after_generate=False,
                        tooltip="Another seed, another variation. Only used while the switch above is on.",
                    )
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Transparency, as Load Image gives it: 1 is transparent. One for all images, or one for each.",
                ),
                io.Combo.Input(
                    "size",
                    options=list(SIZES),
                    default=BY_SCALE,
                    optional=True,
                    tooltip=f"What decides the size. {BY_SCALE}: these two inputs, long_side first unless it is 0. x2, x4: always"
                    " that. long side, short side: the pixels in `side`. megapixels: as many as below. An image that is larger"
                    " already is reduced, without the model, and the line below says so.",
                ),
                io.Int.Input(
                    "side",
                    default=2048,
                    min=1,
                    max=65536,
                    optional=True,
                    tooltip="Pixels of the result's longer or shorter side. Only used while `size` is long side or short side.",
                ),
                io.Float.Input(
                    "megapixels",
                    default=4.0,
                    min=0.01,
                    max=1024.0,
                    step=0.1,
                    optional=True,
                    tooltip="1 is 1024 x 1024 pixels, in the image's own proportions. Only used while `size` is megapixels.",
                ),
                io.Float.Input(
                    "fidelity",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much of the plainly enlarged original is mixed in. 0: the model's result. 0.25 to 0.5 takes back"
                    " detail that looks invented, and is softer. 1: no model.",
                ),
            ],
            outputs=[
                io.Image.Output(id="images", display_name="image", tooltip="The enlarged images."),
                io.Mask.Output(id="masks", display_name="mask", tooltip="The enlarged transparency; 0 (opaque) without a mask."),
            ],
        )

    @classmethod
    def validate_inputs(cls, color_fix: str | None = None) -> bool | str:
        """True, or what is wrong, before anything runs. A connected or missing input is None here.

        ComfyUI repeats the message for every input that this takes, so the others are checked when the node runs.
        """
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
        size: str = BY_SCALE,
        side: int = 2048,
        megapixels: float = 4.0,
        fidelity: float = 0.0,
    ) -> io.NodeOutput:
        sizing = Sizing(scale, long_side, size, side, megapixels)
        options = {
            "upscale": sizing.factor(image.shape[1:3]),
            "tile_size": tile_size or None,
            "tile_overlap": tile_overlap or None,
            "color_fix": None if color_fix == "none" else color_fix,
            "sample_posterior": sample_posterior,
            "generator": torch.Generator().manual_seed(seed),
            "fidelity": fidelity,
        }
        start = time.perf_counter()
        with PeakMemory(model.device) as memory:
            enlarged = upscale_batch(model, image, mask, options)
        seconds, result = time.perf_counter() - start, enlarged.images.shape[1:3]
        sides = (tuple(image.shape[1:3]), tuple(result))
        run = Run(len(image), *sides, sizing.decided_by, seconds, (memory.bytes, memory.kind), enlarged.tiles, enlarged.kernels)
        pair = save_pair(enlarged.first, enlarged.images[0], enlarged.masks[0])
        return io.NodeOutput(enlarged.images, enlarged.masks, ui={"text": (run.line(),), "qartsr_pair": (pair,)})
