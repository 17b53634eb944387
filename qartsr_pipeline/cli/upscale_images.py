"""The part of `qartsr upscale` that needs torch: loads the pipeline, and takes one image after another through it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qartsr_pipeline.bands import Bands, enlarge_in_bands
from qartsr_pipeline.checkpoint_files import quantization_configs
from qartsr_pipeline.cli.device import choose_device, choose_dtype
from qartsr_pipeline.cli.jobs import Job, OutputOptions, is_done
from qartsr_pipeline.cli.messages import Counts, UsageError, image_bar, one_line, say
from qartsr_pipeline.cli.processes import Processes
from qartsr_pipeline.image.resize import enlarged_size
from qartsr_pipeline.image_files import check_writable, read_image, write_image
from qartsr_pipeline.loading import P, load_kind_quietly
from qartsr_pipeline.memory import NotEnoughMemory
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.report import kernel_summary
from qartsr_pipeline.whole_files import make_folder


@dataclass(frozen=True)
class ModelOptions:
    """Arguments of `QArtSRPipeline.__call__`."""

    upscale: float = 4
    tile_size: int | None = None
    tile_overlap: int | None = None
    color_fix: str | None = "wavelet"
    keep_hidden_colors: bool = False
    fidelity: float = 0.0


def load_pipeline(folder: Path, device: str, dtype: str, processes: Processes, kind: type[P]) -> P:
    """Loads the checkpoint and prints device, dtype and kernels. `device` and `dtype` as in `cli.device`; `kind` is its class."""
    chosen, why_device = choose_device(device, processes.device)
    chosen_dtype, why_dtype = choose_dtype(dtype, chosen)
    pipeline = load_kind_quietly(kind, folder, dtype=chosen_dtype).to(chosen)
    # disable=None: no bar unless stderr is a terminal
    pipeline.set_progress_bar_config(desc="tiles", leave=False, disable=None if processes.is_local_main else True)
    number = "" if processes.count == 1 else f"process {processes.index + 1} of {processes.count}: "
    if processes.is_local_main:
        quantized = ", ".join(quantization_configs(folder)) or "nothing, this is a full-precision model"
        say(f"model: {folder} (quantized: {quantized})")
    say(f"{number}device: {chosen} ({why_device}); dtype: {str(chosen_dtype).removeprefix('torch.')} ({why_dtype})")
    parts = (pipeline.components.get(name) for name in ("unet", "transformer", "vae"))
    kernels = kernel_summary(*(part for part in parts if part is not None), device=pipeline.device.type)
    if kernels:
        say(f"{number}kernels: {kernels}")
    return pipeline


def upscale_images(
    pipeline: QArtSRPipeline,
    jobs: Sequence[Job],
    options: ModelOptions,
    output: OutputOptions,
    processes: Processes,
    debug: bool = False,
) -> Counts:
    """Does this process's jobs; errors are printed, with their tracebacks if `debug`."""
    counts = Counts()
    written: dict[tuple[int, int], Path] = {}
    pipeline.check_inputs(**asdict(options))
    with image_bar(len(jobs), processes) as bar:
        for job in jobs:
            try:
                _check_case(job, written)
                if is_done(job, output.overwrite):  # by another run at the same time
                    counts.skipped += 1
                else:
                    _upscale_file(pipeline, job, options, may_create_folder=output.output is not None)
                    counts.written += 1
                    status = job.target.stat()
                    written[status.st_dev, status.st_ino] = job.target
            except Exception as error:
                counts.add_failure(_naming(job, error))
                if debug:
                    traceback.print_exc()
                say(f"qartsr: error: {counts.failures[-1]}", error=True)
            bar.update()
    return counts


def _check_case(job: Job, written: Mapping[tuple[int, int], Path]) -> None:
    """Raises UsageError where the disk takes this job's target for one that this run has written, such as A_x4.png for a_x4.png.

    Args:
        written: the files by device and number.
    """
    try:
        status = job.target.stat()
    except OSError:  # the usual case: there is no such file
        return
    before = written.get((status.st_dev, status.st_ino))
    if before is not None:
        raise UsageError(
            f"{job.target} is the same file as {before} on this disk, which was just written. Rename {job.source}, or write to"
            " another folder with -o."
        )


def _upscale_file(pipeline: QArtSRPipeline, job: Job, options: ModelOptions, may_create_folder: bool) -> None:
    start = time.perf_counter()
    source = read_image(job.source)
    height, width = enlarged_size((source.height, source.width), options.upscale)
    if may_create_folder:
        make_folder(job.target.parent)
    check_writable(job.target, height, width)  # before the work, not after it
    result = _enlarged(pipeline, source.pixels, options)
    notices = [*([job.notice] if job.notice else []), *source.notices, *write_image(job.target, result, source, job.quality)]
    if source.hides_colors and not options.keep_hidden_colors:
        notices.append(
            f"{job.source.name}: colours under transparency were replaced by those beside them (--keep-hidden-colors keeps them)."
        )
    for notice in notices:
        say(f"note: {notice}")
    seconds = time.perf_counter() - start
    say(f"{job.source} -> {job.target} ({width} x {height}, {seconds:.1f} s)")


def _enlarged(pipeline: QArtSRPipeline, pixels: np.ndarray, options: ModelOptions) -> np.ndarray | Bands:
    """(H, W, C) float32 in [0, 1], as a whole if memory suffices."""
    try:
        return pipeline(pixels, output_type="np", return_dict=False, **asdict(options))[0][0]
    except NotEnoughMemory as error:
        arguments = asdict(options)
        if arguments.pop("upscale") != pipeline.config["scale"] or options.color_fix == "adain":
            way = f"With --upscale {pipeline.config['scale']} and --color-fix wavelet, larger images fit."
            raise NotEnoughMemory(f"{error} {way}") from error
        return enlarge_in_bands(pipeline, pixels, **arguments)


def _naming(job: Job, error: Exception) -> str:
    """The message, with the image's name in front unless it is in there."""
    message = one_line(error)
    return message if str(job.source) in message or str(job.target) in message else f"{job.source}: {message}"
