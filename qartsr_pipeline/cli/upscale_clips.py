"""The part of `qartsr upscale` that needs torch, for clips: takes the frames of one clip after another through a pipeline."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from qartsr_pipeline.checkpoint_files.checking import VIDEO_PIPELINE_CLASS, named_class, read_model_index
from qartsr_pipeline.checkpoint_files.integrity import folder_sum
from qartsr_pipeline.cli.clips import ClipJob, ClipOptions
from qartsr_pipeline.cli.messages import Counts, UsageError, one_line, say
from qartsr_pipeline.cli.processes import Processes
from qartsr_pipeline.cli.upscale_images import load_pipeline
from qartsr_pipeline.image.resize import enlarged_size
from qartsr_pipeline.overflow import compute_dtype
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.video_files.clip import Clip, frames_in_words
from qartsr_pipeline.video_files.damage import Damage, clock
from qartsr_pipeline.video_files.reading import open_clip
from qartsr_pipeline.video_files.writing import open_writer, write_enlarged
from qartsr_pipeline.whole_files import make_folder

_SAID_EVERY = 30.0  # seconds between two lines about progress, where there is no terminal for a bar


class FrameModel(Protocol):
    """What enlarges clips.

    Attributes:
        lead: how many frames before a place it has to see again to go on from there without a seam.
    """

    lead: int

    def stream(self, frames: Iterable[np.ndarray], *, upscale: float) -> Iterator[np.ndarray]:
        """Frames (H, W, 3) float32 in [0, 1] -> as many, enlarged, in order."""


@dataclass(frozen=True)
class ClipModelOptions:
    """How a model enlarges. What is None is left to the model.

    Attributes:
        color_fix: "wavelet", "adain" or "none".
    """

    upscale: float = 4
    tile_size: int | None = None
    tile_overlap: int | None = None
    color_fix: str | None = None
    frames_per_chunk: int | None = None
    chunk_overlap: int | None = None
    fidelity: float = 0.0


class FrameByFrame:
    """An image model that is given one frame after another.

    Colours are those of the frame's own low frequencies, so they are as steady as the clip's. Fine detail is made up anew in
    every frame.
    """

    lead = 0

    def __init__(self, pipeline: QArtSRPipeline, options: ClipModelOptions) -> None:
        if options.color_fix == "adain":
            raise UsageError(
                "--color-fix adain takes the colours of each frame as a whole, which flickers in a clip. Use wavelet, or a video"
                " model."
            )
        if options.frames_per_chunk is not None or options.chunk_overlap is not None:
            raise UsageError("--frames-per-chunk and --chunk-overlap are for video models; this one takes single images.")
        self._pipeline = pipeline
        self._arguments: dict[str, Any] = {
            "tile_size": options.tile_size,
            "tile_overlap": options.tile_overlap,
            "color_fix": None if options.color_fix == "none" else "wavelet",
            "fidelity": options.fidelity,
        }
        pipeline.check_inputs(upscale=options.upscale, **self._arguments)

    def stream(self, frames: Iterable[np.ndarray], *, upscale: float) -> Iterator[np.ndarray]:
        """See `FrameModel`."""
        for frame in frames:
            yield self._pipeline(frame, upscale=upscale, output_type="np", return_dict=False, **self._arguments)[0][0]


class WholeClip:
    """A video model."""

    def __init__(self, pipeline: LSGQuantVideoPipeline, options: ClipModelOptions) -> None:
        if options.color_fix == "wavelet":
            raise UsageError("--color-fix wavelet is for image models. Video models take adain (the default) or none.")
        if options.tile_overlap is not None:
            raise UsageError("--tile-overlap is for image models. Leave it out; --tile-size is for both.")
        if options.fidelity:
            raise UsageError("--fidelity is for image models. Leave it out.")
        self._pipeline = pipeline
        self._arguments: dict[str, Any] = {
            "tile_size": options.tile_size,
            "color_fix": None if options.color_fix == "none" else "adain",
            "frames_per_chunk": options.frames_per_chunk,
            "chunk_overlap": options.chunk_overlap,
        }
        self.lead, _ = pipeline.check_inputs(options.upscale, **self._arguments)

    def stream(self, frames: Iterable[np.ndarray], *, upscale: float) -> Iterator[np.ndarray]:
        """See `FrameModel`."""
        return self._pipeline.stream(frames, upscale=upscale, **self._arguments)


def load_model(
    folder: Path, device: str, dtype: str, options: ClipModelOptions, processes: Processes
) -> tuple[FrameModel, dict[str, str]]:
    """Loads the checkpoint and prints device, dtype and kernels. `device` and `dtype` as in `cli.device`.

    Returns:
        The model, and what its results depend on besides its options, so that `--resume` does not mix frames of two models.
    """
    if named_class(read_model_index(folder)) == VIDEO_PIPELINE_CLASS:
        video = load_pipeline(folder, device, dtype, processes, LSGQuantVideoPipeline)
        return WholeClip(video, options), _facts(folder, video)
    pipeline = load_pipeline(folder, device, dtype, processes, QArtSRPipeline)
    model = FrameByFrame(pipeline, options)
    pipeline.set_progress_bar_config(disable=True)  # of tiles; there is one of frames
    if processes.is_local_main:
        say(f"note: {folder.name} is a model for images: frames are enlarged one by one, so the finest detail may flicker.")
    return model, _facts(folder, pipeline)


def _facts(folder: Path, pipeline: LSGQuantVideoPipeline | QArtSRPipeline) -> dict[str, str]:
    return {"model": folder_sum(folder), "device": pipeline.device.type, "dtype": str(compute_dtype(pipeline.vae))}


@dataclass(frozen=True)
class _Task:
    """What is the same for all clips of a command."""

    model: FrameModel
    facts: dict[str, str]  # about the model, as `load_model` returns them
    model_options: ClipModelOptions
    options: ClipOptions


def upscale_clips(
    model: FrameModel,
    facts: dict[str, str],
    jobs: Sequence[ClipJob],
    model_options: ClipModelOptions,
    options: ClipOptions,
    processes: Processes,
    debug: bool = False,
) -> Counts:
    """Does this process's clips; errors are printed, with their tracebacks if `debug`.

    Args:
        facts: see `load_model`.
    """
    counts, task = Counts(what="clips"), _Task(model, facts, model_options, options)
    for job in jobs:
        try:
            _upscale_clip(task, job, shown=processes.is_local_main)
            counts.written += 1
        except Exception as error:
            message = one_line(error)
            counts.add_failure(
                message if str(job.source) in message or str(job.target) in message else f"{job.source}: {message}"
            )
            if debug:
                traceback.print_exc()
            say(f"qartsr: error: {counts.failures[-1]}", error=True)
    return counts


def _upscale_clip(task: _Task, job: ClipJob, shown: bool) -> None:
    start, options, damage = time.perf_counter(), task.options, Damage()
    clip = open_clip(job.source, options.fps)
    size = enlarged_size((clip.height, clip.width), task.model_options.upscale)
    if options.output is not None:
        make_folder(job.target.parent)
    settings = {**task.facts, "model_options": asdict(task.model_options), "deinterlace": options.deinterlace}
    writer, changes = open_writer(clip, job.target, size, options.codec, options.crf, settings, options.resume, options.overwrite)
    for notice in [*clip.notices, *changes, *_advice(clip, options)]:
        say(f"note: {notice}")
    if writer.done:
        say(f"{job.target}: already there: {frames_in_words(writer.done)}")
    before = writer.done
    try:
        with _Progress(job.source.name, clip.frames, before, shown) as progress:
            enlarge = partial(task.model.stream, upscale=task.model_options.upscale)
            for _ in write_enlarged(enlarge, clip, writer, task.model.lead, options.deinterlace, damage):
                progress.step()
        notices = writer.finish()
    except BaseException:
        writer.suspend(keep=True)
        if writer.done:
            kept = "the first frame is" if writer.done == 1 else f"the first {writer.done} frames are"
            say(f"{job.target}: {kept} kept. Add --resume to go on after that.", error=True)
        raise
    for notice in [*notices, *damage.notices(clip)]:
        say(f"note: {notice}")
    seconds = time.perf_counter() - start
    done = writer.done - before
    facts = f"{size[1]} x {size[0]}, {frames_in_words(done)}, {seconds:.1f} s, {done / seconds:.2f} frames/s"
    say(f"{job.source} -> {job.target} ({facts})")


def _advice(clip: Clip, options: ClipOptions) -> list[str]:
    """What the user should know before hours are spent."""
    name, said = clip.path.name, []
    if clip.interlaced and not options.deinterlace:
        said.append(
            f"{name} is interlaced: each frame shows two moments, in every other line. The combs are enlarged, too; --deinterlace"
            " removes them."
        )
    if clip.colour.is_hdr:
        said.append(f"{name} is in HDR, and stays so: its numbers are enlarged as they are. The models have seen no HDR.")
    return said


class _Progress:
    """A bar with frames a second and the time left; where there is no terminal, a line now and then."""

    def __init__(self, name: str, total: int | None, done: int, shown: bool) -> None:
        self._name, self._total, self._done, self._first = name, total, done, done
        self._start = self._said = time.perf_counter()
        self._bar = tqdm(total=total, initial=done, desc=name, unit="frame", disable=None if shown else True)
        self._lines = shown and self._bar.disable

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """Counts a frame."""
        self._done += 1
        self._bar.update()
        now = time.perf_counter()
        if self._lines and now - self._said >= _SAID_EVERY:
            self._said = now
            rate = (self._done - self._first) / (now - self._start)
            left_of = (
                f"{self._done} of {self._total}, {rate:.2f} frames/s, {clock(max(0, self._total - self._done) / rate)} left"
                if self._total
                else ""
            )
            say(f"{self._name}: {left_of or f'{frames_in_words(self._done)}, {rate:.2f} frames/s'}")
