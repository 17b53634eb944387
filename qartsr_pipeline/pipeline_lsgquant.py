"""LSGQuantVideoPipeline: clips in, enlarged clips out."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel
from diffusers.utils import BaseOutput

from qartsr_pipeline.calls import access_to
from qartsr_pipeline.checkpoint_files.checking import VIDEO_PIPELINE_CLASS
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.image.conversion import ImageTensors, to_pil
from qartsr_pipeline.image.resize import enlarged_size
from qartsr_pipeline.image.tiles import SURE_SHARE, choose_tile_size, free_memory, tile_grid
from qartsr_pipeline.input_checks import check_upscale
from qartsr_pipeline.memory import NotEnoughMemory, free_main_memory
from qartsr_pipeline.one_step_video import ClipPlan, VideoNetwork, upscaled_frames
from qartsr_pipeline.overflow import OverflowMemory, compute_dtype
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.video.causal_vae import bytes_per_pixel, skip_idle_attention, spatial_factor, temporal_factor
from qartsr_pipeline.video.clip_color import COLOR_FIXES
from qartsr_pipeline.video.components import check_video_components
from qartsr_pipeline.video.frames import checked_frames, frames_of
from qartsr_pipeline.video_files.reading import open_clip, read_frames

OUTPUT_TYPES = ("pil", "np", "pt")
MINIMUM_SIDE = 64  # enlarged frames that are smaller are padded by mirroring
MINIMUM_TILE = 64


@dataclass
class LSGQuantVideoPipelineOutput(BaseOutput):
    """Output of `LSGQuantVideoPipeline`.

    Args:
        frames: the enlarged clip as a batch of one, in the form that `output_type` asks for; see the call.
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor


class LSGQuantVideoPipeline(CheckpointPipeline):
    """Video super-resolution with one step of WAN's transformer, full precision or quantized.

    The structure is that of LSGQuant (arXiv 2602.03182) and DOVE: the enlarged clip is encoded, z_H = z_L - sigma_T v, decoded.

    Args:
        transformer: predicts the velocity v at the one timestep.
        vae: its causal encoder and decoder.
        scheduler: a flow-matching one; sigma_T is `timestep` divided by its `num_train_timesteps`.
        prompt_embedding: the fixed prompt.
        timestep: T, the one timestep the model was trained at.
        scale: the enlargement it was trained at.
        tile_size: side of the tiles that the transformer sees, in pixels of the enlarged frame: about what it was trained on.
        frames_per_chunk: frames that the transformer sees at once: about what it was trained on.
    """

    model_cpu_offload_seq = "transformer->vae"  # type: ignore[assignment]
    checkpoint_class = VIDEO_PIPELINE_CLASS
    share_tile_statistics = False  # no norm of these models reaches beyond a pixel

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        prompt_embedding: PromptEmbedding,
        timestep: int = 399,
        scale: int = 4,
        tile_size: int = 512,
        frames_per_chunk: int = 33,
    ):
        super().__init__()
        check_video_components(transformer, vae, scheduler, prompt_embedding, timestep, scale)
        components = {"transformer": transformer, "vae": vae, "scheduler": scheduler, "prompt_embedding": prompt_embedding}
        self.register_modules(**components)
        self.register_to_config(timestep=timestep, scale=scale, tile_size=tile_size, frames_per_chunk=frames_per_chunk)
        if vae is not None:
            skip_idle_attention(vae)
        self._overflows = OverflowMemory()

    @property
    def multiple(self) -> int:
        """Enlarged frames are padded so that their sides are multiples of this."""
        return spatial_factor(self.vae) * max(self.transformer.config["patch_size"][1:])

    @torch.no_grad()
    def __call__(
        self,
        video: list | np.ndarray | torch.Tensor | str | os.PathLike,
        upscale: float = 4,
        frames_per_chunk: int | None = None,
        chunk_overlap: int | None = None,
        tile_size: int | None = None,
        color_fix: str | None = "adain",
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> LSGQuantVideoPipelineOutput | tuple:
        """Enlarges a clip. For a long one use `stream`, which does not hold it in memory.

        Args:
            video: a list of frames as in `stream`, a numpy array (F, H, W, C) or a torch tensor (F, C, H, W), of uint8, uint16 or
                float in [0, 1]; or a video file, or an image sequence such as "frames/%05d.png", read with PyAV (the extra
                `video`). Any length from one frame, any size from 1 x 1. Files keep their sound and frame times with
                `qartsr upscale` alone.
            upscale, frames_per_chunk, chunk_overlap, tile_size, color_fix: see `stream`.
            output_type: "pil": list with one list of PIL images. "np": float32 array (1, F, H, W, 3) in [0, 1]. "pt": float32 CPU
                tensor (1, F, 3, H, W) in [0, 1].
            return_dict: False for a plain tuple.

        Returns:
            `LSGQuantVideoPipelineOutput`, or a tuple with `frames` as its only element. F frames, each of exactly
            round(height * upscale) x round(width * upscale) pixels.

        Raises:
            TypeError, ValueError: an argument is not as described; the message names it.
            NotEnoughMemory: a MemoryError, before anything is computed: the result does not fit into main memory, or not even
                one tile does.
            VideoFileError: the file cannot be read, or PyAV is not installed.
            FloatingPointError: the network's result is not finite, not even in float32.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(map(repr, OUTPUT_TYPES))}, but is {output_type!r}.")
        upscale = check_upscale(upscale)
        frames = _all_frames(video, upscale, output_type) if isinstance(video, (str, os.PathLike)) else frames_of(video)
        first = next(checked_frames(frames[:1]))
        _check_result_memory(len(frames), (first.shape[-2], first.shape[-1]), upscale, output_type)
        arguments = (upscale, frames_per_chunk, chunk_overlap, tile_size, color_fix)
        results = self._stream(checked_frames(frames), *arguments)
        with self.progress_bar(total=len(frames)) as bar:
            made: list[Any] = []
            for frame in results:
                made.append(to_pil(ImageTensors(frame)) if output_type == "pil" else frame)
                bar.update()
        return self._output(made, output_type, return_dict)

    def _output(self, frames: list, output_type: str, return_dict: bool) -> LSGQuantVideoPipelineOutput | tuple:
        result: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor = [frames]
        if output_type != "pil":
            result = torch.cat(frames)[None]
            result = result.permute(0, 1, 3, 4, 2).contiguous().numpy() if output_type == "np" else result
        return LSGQuantVideoPipelineOutput(frames=result) if return_dict else (result,)

    def stream(
        self,
        frames: Iterable[np.ndarray | torch.Tensor | PIL.Image.Image] | str | os.PathLike,
        upscale: float = 4,
        frames_per_chunk: int | None = None,
        chunk_overlap: int | None = None,
        tile_size: int | None = None,
        color_fix: str | None = "adain",
    ) -> Iterator[np.ndarray]:
        """Enlarges a clip of any length: yields one frame for each that goes in, in order, in memory that does not grow.

        A frame comes out once the chunk that it is in has gone in. At a cut everything begins anew. A frame without colour stays
        without. To stop, close the generator.

        Args:
            frames: anything to iterate over: numpy arrays (H, W, C) of uint8, uint16 or float in [0, 1], torch tensors
                (C, H, W) of the same, or PIL images, grey or colour, all of one size. Or a file, as in the call.
            upscale: enlargement, above 0 and up to 16. The network works at its own scale; another one is resampled.
            frames_per_chunk: how many frames the transformer sees at once, at least 1; rounded up to whole latents. None: the
                model's own.
            chunk_overlap: frames that neighbouring chunks have in common and are blended over, at most half a chunk. None: a
                quarter of it.
            tile_size: longest side of a tile in pixels of the enlarged frame, at the model's scale. None: the model's own for the
                transformer, and for the autoencoder whole frames, or tiles as large as memory allows.
            color_fix: "adain": the clip gets mean and contrast of its enlarged input, see `video.clip_color`. None: the network's
                own colours.

        Yields:
            float32 arrays (round(H * upscale), round(W * upscale), 3) in [0, 1].

        Raises:
            TypeError, ValueError: an argument is not as described, or a frame, once it is read; the message names it.
            FloatingPointError: the network's result is not finite, not even in float32.
        """
        given: Iterable[object]
        if isinstance(frames, (str, os.PathLike)):
            given = (frame.pixels for frame in read_frames(open_clip(frames)))
        else:  # a single array would be taken apart into rows
            given = frames_of(frames, "frames") if isinstance(frames, (np.ndarray, torch.Tensor, PIL.Image.Image)) else frames
        for frame in self._stream(checked_frames(given), upscale, frames_per_chunk, chunk_overlap, tile_size, color_fix):
            yield frame[0].permute(1, 2, 0).contiguous().numpy()

    @torch.no_grad()
    def _stream(
        self,
        frames: Iterator[torch.Tensor],
        upscale: float,
        frames_per_chunk: int | None,
        chunk_overlap: int | None,
        tile_size: int | None,
        color_fix: str | None,
    ) -> Iterator[torch.Tensor]:
        """`stream` from and to tensors (1, 3, H, W)."""
        first = next(frames)
        plan = self._plan((first.shape[-2], first.shape[-1]), upscale, frames_per_chunk, chunk_overlap, tile_size, color_fix)

        def whole() -> Iterator[torch.Tensor]:
            yield first
            yield from frames

        try:
            yield from upscaled_frames(self.network(), whole(), plan)
        finally:
            self.maybe_free_model_hooks()

    def network(self) -> VideoNetwork:
        """The stages on tensors (encode, step, decode), for engineers who build on them."""
        timestep = self.config["timestep"]
        return VideoNetwork(
            transformer=self.transformer,
            vae=self.vae,
            prompt_embeds=self.prompt_embedding(1),
            timestep=timestep,
            sigma=timestep / self.scheduler.config["num_train_timesteps"],
            device=self._execution_device,
            overflows=self._overflows,
        )

    def check_inputs(
        self,
        upscale: float = 4,
        frames_per_chunk: int | None = None,
        chunk_overlap: int | None = None,
        tile_size: int | None = None,
        color_fix: str | None = "adain",
    ) -> tuple[int, int]:
        """Frames of a chunk and of an overlap; raises TypeError or ValueError that names the wrong argument of `stream`."""
        check_upscale(upscale)
        if color_fix is not None and color_fix not in COLOR_FIXES:
            raise ValueError(f"`color_fix` must be one of {', '.join(map(repr, COLOR_FIXES))} or None, but is {color_fix!r}.")
        frames = _whole("frames_per_chunk", frames_per_chunk, self.config["frames_per_chunk"], 1)
        overlap = _whole("chunk_overlap", chunk_overlap, frames // 4, 0)
        if overlap > frames // 2:
            raise ValueError(
                f"`chunk_overlap` must be at most half of `frames_per_chunk` ({frames // 2}), but is {overlap}: a frame is"
                " blended from two chunks at most."
            )
        _whole("tile_size", tile_size, self.config["tile_size"], MINIMUM_TILE)
        return frames, overlap

    def _plan(
        self,
        size: tuple[int, int],
        upscale: float,
        frames_per_chunk: int | None,
        chunk_overlap: int | None,
        tile_size: int | None,
        color_fix: str | None,
    ) -> ClipPlan:
        """Checks the arguments of `stream` and lays out tiles and chunks for frames of (height, width)."""
        frames, overlap = self.check_inputs(upscale, frames_per_chunk, chunk_overlap, tile_size, color_fix)
        multiple, scale, factor = self.multiple, self.config["scale"], temporal_factor(self.vae)
        tile = _whole("tile_size", tile_size, self.config["tile_size"], MINIMUM_TILE) // multiple * multiple
        height, width = (-(-max(side, MINIMUM_SIDE) // multiple) * multiple for side in enlarged_size(size, scale))
        vae_tile = self._vae_tile((height, width), None if tile_size is None else tile)
        return ClipPlan(
            scale=scale,
            upscale=check_upscale(upscale),
            multiple=multiple,
            minimum=MINIMUM_SIDE,
            vae_grid=tile_grid((height, width), vae_tile, _overlap(vae_tile, multiple), multiple),
            grid=tile_grid((height, width), tile, _overlap(tile, multiple), multiple),
            length=1 + -(-(frames - 1) // factor),
            overlap=min(-(-overlap // factor), (1 + -(-(frames - 1) // factor)) // 2),
            align_color=color_fix is not None,
        )

    def _vae_tile(self, padded: tuple[int, int], wanted: int | None) -> int | None:
        """Side of the autoencoder's tiles; None for whole frames. Raises NotEnoughMemory if not even one tile fits."""
        with access_to(self.vae).together():  # it may be in a wider dtype at the moment
            pixel_bytes = bytes_per_pixel(self.vae, compute_dtype(self.vae).itemsize)
        free = free_memory(self._execution_device)
        tile = choose_tile_size(padded, pixel_bytes, free) if wanted is None else wanted
        height, width = (side if tile is None else min(side, tile) for side in padded)
        needed = int(SURE_SHARE * pixel_bytes * height * width)
        if needed > free:
            side = math.isqrt(int(free / (SURE_SHARE * pixel_bytes))) // self.multiple * self.multiple
            way_out = f"Pass tile_size={side}, which fits" if side >= MINIMUM_TILE else "Free some memory"
            raise NotEnoughMemory(
                f"One tile of {width} x {height} pixels takes at least {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free."
                f" {way_out}, or load the pipeline with dtype=torch.bfloat16."
            )
        return None if tile is None else tile // self.multiple * self.multiple


def _all_frames(file: str | os.PathLike, upscale: float, output_type: str) -> list[np.ndarray]:
    """Of a clip that fits into memory with its result, as far as the file says how long it is."""
    clip = open_clip(file)
    _check_result_memory(clip.frames or 1 if clip.is_exact else 1, (clip.height, clip.width), upscale, output_type)
    return [frame.pixels for frame in read_frames(clip)]


def _overlap(tile: int | None, multiple: int) -> int:
    """A quarter of a tile, at most 64 pixels, in whole multiples."""
    return 0 if tile is None else min(64, tile // 4) // multiple * multiple


def _whole(name: str, value: object, default: int, least: int) -> int:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer or None, but is {value!r}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, but is {value}.")
    return int(value)


def _check_result_memory(count: int, size: tuple[int, int], upscale: float, output_type: str) -> None:
    """Raises NotEnoughMemory unless so many frames of (height, width) pixels, enlarged, can be returned all at once."""
    height, width = enlarged_size(size, upscale)
    needed = count * height * width * {"pil": 3, "pt": 24, "np": 36}[output_type]
    free = free_main_memory()
    if needed > free:
        raise NotEnoughMemory(
            f"{count} enlarged frames of {width} x {height} pixels take about {needed / 1e9:.1f} GB as {output_type!r}, and"
            f" {free / 1e9:.1f} GB of main memory are free. Use pipeline.stream(frames), which yields one frame at a time."
        )
