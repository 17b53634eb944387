"""Takes the frames of a clip through a loaded model: from a file into a file, or from tensors into a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline.cli.messages import is_out_of_memory
from qartsr_pipeline.memory import NotEnoughMemory

from .installation import problem_of
from .managed_model import ManagedModel
from .progress import FrameProgress, interruptible
from .upscale_batch import check_memory, tile_memory
from .video_source import source_file

PYAV = "17.0.0"  # ComfyUI itself is content with older ones


@dataclass(frozen=True)
class Options:
    """How clips are enlarged. What is None is left to the model."""

    scale: float
    tile_size: int | None = None
    frames_per_chunk: int | None = None
    chunk_overlap: int | None = None
    keep_colors: bool = True


@dataclass(frozen=True)
class EnlargedClip:
    """A file that was written.

    Attributes:
        sizes: (height, width) of the clip and of the result.
        kernels: see `Run`.
        notices: what the user should know about the clip or the result, one sentence each.
    """

    file: Path
    frames: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    kernels: str
    notices: list[str]


def enlarged_clip(
    model: ManagedModel,
    video: Any,
    folder: Path,
    options: Options,
    deinterlace: bool,
    codec: str | None,
    crf: int | None,
) -> EnlargedClip:
    """Enlarges a clip into an MP4 in ``folder``; memory does not grow with its length.

    Args:
        video: a `VideoInput` of ComfyUI's.
        codec, crf: None for the default, see `video_files.encoding`.

    Raises:
        ValueError: the clip cannot be read, the result not be written, or options are not valid.
        MemoryError: memory ran out. InterruptProcessingException: cancelled by the user.
    """
    check_pyav()
    from qartsr_pipeline.image.resize import enlarged_size
    from qartsr_pipeline.video_files.damage import Damage
    from qartsr_pipeline.video_files.reading import open_clip
    from qartsr_pipeline.video_files.writing import open_writer, write_enlarged

    source = source_file(video, folder)
    clip, damage = open_clip(source), Damage()
    sizes = (clip.height, clip.width), enlarged_size((clip.height, clip.width), options.scale)
    frame_model = _frame_model(model, options)
    writer, changes = open_writer(clip, folder / "enlarged.mp4", sizes[1], codec, crf)
    progress = FrameProgress(clip.frames)
    try:
        with _computing(model, sizes[0], options) as kernels:
            for frame in write_enlarged(frame_model, clip, writer, deinterlace=deinterlace, damage=damage):
                progress(frame)
    except BaseException:
        writer.suspend(keep=False)
        raise
    notices = [*clip.notices, *changes, *writer.finish(), *damage.notices(clip)]
    if source.parent == folder:  # a copy
        source.unlink()
    if clip.interlaced and not deinterlace:
        notices.append("the clip is interlaced: switch deinterlace on to have no combs enlarged.")
    return EnlargedClip(folder / "enlarged.mp4", progress.done, sizes, kernels(), notices)


def enlarged_frames(model: ManagedModel, images: torch.Tensor, options: Options) -> tuple[torch.Tensor, str]:
    """Enlarges the frames of one clip, which are held once, as are the results.

    Args:
        images: float32 (F, H, W, C), 0 to 1, as ComfyUI has them.

    Returns:
        (F, H', W', 3) float32, and `Run.kernels`.

    Raises:
        ValueError: images or options that are not valid. MemoryError: too large for this machine.
        InterruptProcessingException: cancelled by the user.
    """
    from qartsr_pipeline.image.resize import enlarged_size

    count, height, width, channels = images.shape
    if channels == 4 and bool((images[..., 3] < 1).any()):
        raise ValueError("the frames are partly transparent. Enlarge them with QArtSR Upscale, or take their transparency away.")
    size = enlarged_size((height, width), options.scale)
    check_memory(count, (height, width), size, model.pipeline.config.scale)
    frame_model = _frame_model(model, options)
    result, progress = torch.empty(count, *size, 3), FrameProgress(count)
    frames = (image[..., :3].expand(-1, -1, 3).float().cpu().clamp(0, 1).numpy() for image in images)
    with _computing(model, (height, width), options) as kernels:
        for frame in frame_model(frames):
            result[progress.done] = torch.from_numpy(frame)
            progress(frame)
    return result, kernels()


def check_pyav() -> None:
    """Raises ImportError unless this environment has a PyAV that reads and writes clips as they must be."""
    problem = problem_of("av", PYAV)
    if problem:
        raise ImportError(f"{problem}, which QArtSR needs for clips. Run: pip install 'av>={PYAV}' with ComfyUI's Python.")


def _frame_model(model: ManagedModel, options: Options) -> Callable[[Iterable[np.ndarray]], Iterator[np.ndarray]]:
    """What takes frames (H, W, 3) in [0, 1] and yields as many, enlarged."""
    from qartsr_pipeline.cli.upscale_clips import ClipModelOptions, FrameByFrame, WholeClip

    chosen = ClipModelOptions(options.scale, options.tile_size, color_fix=None if options.keep_colors else "none")
    if not model.for_clips:
        return partial(FrameByFrame(model.pipeline, chosen).stream, upscale=options.scale)
    chosen = replace(chosen, frames_per_chunk=options.frames_per_chunk, chunk_overlap=options.chunk_overlap)
    return partial(WholeClip(model.pipeline, chosen).stream, upscale=options.scale)


@contextmanager
def _computing(model: ManagedModel, size: tuple[int, int], options: Options) -> Iterator[Callable[[], str]]:
    """Has the model on its device, with its kernels, and the cancel button watched; yields what tells the kernels used."""
    from comfy import model_management

    from qartsr_pipeline.quantization.report import kernel_summary

    network = model.patcher.model
    model.bring_to_device(tile_memory(model, size, options.tile_size))
    try:
        with model.kernels(), interruptible(network):
            yield partial(kernel_summary, *network.children(), device=model.device.type)
    except NotEnoughMemory:
        raise
    except (model_management.OOM_EXCEPTION, MemoryError, RuntimeError) as error:
        if not isinstance(error, model_management.OOM_EXCEPTION) and not is_out_of_memory(error):
            raise
        tile = options.tile_size or model.pipeline.config.get("tile_size") or 1024
        raise MemoryError(
            f"memory ran out on {model.device}. Choose a smaller tile_size, such as {max(64, tile // 2 // 16 * 16)}, or fewer"
            " frames_per_chunk, or unload other models."
        ) from error
