"""QArtSR Video Upscale and QArtSR Video Frames: enlarge a clip, or the frames that a graph has already."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io

from .load_model import CATEGORY, advanced, found_by, input_for_any_model
from .managed_model import ManagedModel
from .run_summary import ClipRun, PeakMemory
from .target_size import LARGEST_SCALE
from .video_run import Options, enlarged_clip, enlarged_frames

AUTO = "auto"
CODECS = (AUTO, "h264", "hevc", "av1")  # that MP4 holds
FRAME_BY_FRAME = "{} is a model for images: frames were enlarged one by one, and the finest detail may flicker."


def enlarging_inputs() -> list[Any]:
    """The inputs that both nodes have, after the clip."""
    return [
        io.Float.Input(
            "scale",
            default=4.0,
            min=1.0,
            max=float(LARGEST_SCALE),
            step=0.05,
            tooltip="How many times as wide and high the result is. The model always works at its own scale, 4 times, and the"
            " result is resampled from that: 2 takes as long as 4.",
        ),
        advanced(
            io.Int.Input(
                "tile_size",
                default=0,
                min=0,
                max=8192,
                step=16,
                tooltip="Large frames are worked on in overlapping tiles. This is the longest side of one in pixels, at 4 times"
                " the clip's size. Smaller tiles need less memory and more time. 0: the model's own, or by free memory.",
            )
        ),
        advanced(
            io.Int.Input(
                "frames_per_chunk",
                default=0,
                min=0,
                max=4096,
                tooltip="How many frames a model for clips sees at once. Fewer need less memory. 0: the model's own. Models for"
                " images see one, whatever this says.",
            )
        ),
        advanced(
            io.Int.Input(
                "chunk_overlap",
                default=-1,
                min=-1,
                max=2048,
                tooltip="Frames over which neighbouring chunks are blended, at most half a chunk. -1: a quarter of a chunk.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "keep_colors",
                default=True,
                tooltip="On: the result has the clip's colours, in every frame. Off: the model's own, which may drift.",
            )
        ),
    ]


class QArtSRVideoUpscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRVideoUpscale",
            display_name="QArtSR Video Upscale",
            category=CATEGORY,
            description="Enlarges a clip of any length, as a stream into a file. Frame times, sound, colours and bits are kept.",
            **found_by("video upscale", "upscale video", "video super resolution", "enhance video", "video upscaler", "4x"),
            inputs=[
                input_for_any_model(),
                io.Video.Input("video", tooltip="From Load Video. Of a clip that another node has made, frames have 8 bits."),
                *enlarging_inputs(),
                advanced(
                    io.Boolean.Input(
                        "deinterlace",
                        default=False,
                        tooltip="On: make one frame of the two moments in each of an interlaced clip.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "codec",
                        options=list(CODECS),
                        default=AUTO,
                        tooltip="Of the result, which is an MP4. auto: h264 for 8 bits, hevc for more. Save Video copies it as it"
                        " is while its own format and codec are auto.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "crf",
                        default=-1,
                        min=-1,
                        max=63,
                        tooltip="The encoder's quality: 0 is best and largest. -1: 18 for h264, 20 for hevc, 24 for av1.",
                    )
                ),
            ],
            outputs=[
                io.Video.Output(id="video_out", display_name="video", tooltip="For Save Video. It is a file, not in memory."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ManagedModel,
        video: Any,
        scale: float,
        tile_size: int,
        frames_per_chunk: int,
        chunk_overlap: int,
        keep_colors: bool,
        deinterlace: bool,
        codec: str,
        crf: int,
    ) -> io.NodeOutput:
        import folder_paths
        from comfy_api.latest import InputImpl

        if codec not in CODECS:
            raise ValueError(f"codec {codec!r} is none of {', '.join(CODECS)}.")
        options = options_of(scale, tile_size, frames_per_chunk, chunk_overlap, keep_colors)
        temporary = Path(folder_paths.get_temp_directory())
        temporary.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="qartsr_clip_", dir=temporary))
        start = time.perf_counter()
        try:
            with PeakMemory(model.device) as memory:
                chosen = None if codec == AUTO else codec, None if crf < 0 else crf
                result = enlarged_clip(model, video, folder, options, deinterlace, *chosen)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        run = ClipRun(result.frames, *result.sizes, time.perf_counter() - start, (memory.bytes, memory.kind), result.kernels)
        text = "\n".join([run.line(), *_notes(model, result.notices)])
        return io.NodeOutput(InputImpl.VideoFromFile(str(result.file)), ui={"text": (text,)})


class QArtSRVideoFrames(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRVideoFrames",
            display_name="QArtSR Video Frames",
            category=CATEGORY,
            description="Enlarges a batch of images that are the frames of a clip, in their order. For whole clips, QArtSR Video"
            " Upscale needs less memory.",
            **found_by("upscale frames", "video frames upscale", "video super resolution"),
            inputs=[
                input_for_any_model(),
                io.Image.Input("images", tooltip="The frames of one clip, in order."),
                *enlarging_inputs(),
            ],
            outputs=[io.Image.Output(id="frames", display_name="images", tooltip="As many frames, enlarged.")],
        )

    @classmethod
    def execute(
        cls,
        model: ManagedModel,
        images: torch.Tensor,
        scale: float,
        tile_size: int,
        frames_per_chunk: int,
        chunk_overlap: int,
        keep_colors: bool,
    ) -> io.NodeOutput:
        options = options_of(scale, tile_size, frames_per_chunk, chunk_overlap, keep_colors)
        start = time.perf_counter()
        with PeakMemory(model.device) as memory:
            frames, kernels = enlarged_frames(model, images, options)
        sizes = tuple(images.shape[1:3]), tuple(frames.shape[1:3])
        run = ClipRun(len(frames), *sizes, time.perf_counter() - start, (memory.bytes, memory.kind), kernels)
        return io.NodeOutput(frames, ui={"text": ("\n".join([run.line(), *_notes(model, [])]),)})


def options_of(scale: float, tile_size: int, frames_per_chunk: int, chunk_overlap: int, keep_colors: bool) -> Options:
    """The values of `enlarging_inputs`, in which 0, or -1, leaves the choice to the model."""
    return Options(scale, tile_size or None, frames_per_chunk or None, None if chunk_overlap < 0 else chunk_overlap, keep_colors)


def _notes(model: ManagedModel, notices: list[str]) -> Iterator[str]:
    """What is shown below the line about a run, and written into the log."""
    for notice in [*([] if model.for_clips else [FRAME_BY_FRAME.format(model.name)]), *notices]:
        logging.info("QArtSR: %s", notice)
        yield notice
