"""`qartsr upscale`: picture files in, enlarged picture files out. One that fails does not stop the others."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from typing import TYPE_CHECKING

from ..checkpoint_files import fetch, quantization_configs
from ..picture_files import check_writable, make_folder, read_picture, write_picture
from .jobs import Job, check_job, plan_jobs
from .messages import one_line

if TYPE_CHECKING:
    from ..pipeline_qartsr import QArtSRPipeline


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 2 if any picture failed."""
    jobs = plan_jobs(options.inputs, options.output, options.upscale)
    pipeline = load_pipeline(options.model, options.device, options.dtype)
    arguments = {
        "upscale": options.upscale,
        "tile_size": options.tile_size,
        "tile_overlap": options.tile_overlap,
        "color_fix": None if options.color_fix == "none" else options.color_fix,
    }
    pipeline.check_inputs(**arguments)
    failed, taken = 0, set()
    for job in jobs:
        try:
            check_job(job, taken, options.overwrite)
            _upscale_file(pipeline, job, arguments, may_create_folder=options.output is not None)
        except Exception as error:
            failed += 1
            if options.debug:
                traceback.print_exc()
            print(f"qartsr: error: {_naming(job, error)}", file=sys.stderr)
    if len(jobs) > 1:
        print(f"{len(jobs)} pictures: {len(jobs) - failed} written, {failed} failed")
    return 2 if failed else 0


def load_pipeline(model: str, device: str, dtype: str) -> QArtSRPipeline:
    """Loads the checkpoint, choosing device and float type, and prints the choices with their reasons."""
    folder = fetch(model)
    # Imported only now: a checkpoint that does not exist is reported without waiting for torch.
    from .device import choose_device, choose_dtype
    from .loading import load_quietly

    device, why_device = choose_device(device)
    chosen_dtype, why_dtype = choose_dtype(dtype, device)
    pipeline = load_quietly(folder, dtype=chosen_dtype).to(device)
    pipeline.set_progress_bar_config(desc="tiles", leave=False, disable=None)  # None: no bar where nobody watches
    quantized = ", ".join(quantization_configs(folder)) or "nothing, this is a full-precision model"
    print(f"model: {folder} (quantized: {quantized})")
    print(f"device: {device} ({why_device}); dtype: {str(chosen_dtype).removeprefix('torch.')} ({why_dtype})")
    return pipeline


def _upscale_file(pipeline: QArtSRPipeline, job: Job, arguments: dict, may_create_folder: bool) -> None:
    from ..image.resize import enlarged_size

    start = time.perf_counter()
    source = read_picture(job.source)
    height, width = enlarged_size(source.pixels.shape[:2], arguments["upscale"])
    if may_create_folder:
        make_folder(job.target.parent)
    check_writable(job.target, (width, height))  # before the work, not after it
    result = pipeline(source.pixels, output_type="np", **arguments).images[0]
    notices = source.notices + write_picture(job.target, result, source)
    for notice in notices:
        print(f"note: {notice}")
    seconds = time.perf_counter() - start
    print(f"{job.source} -> {job.target} ({result.shape[1]} x {result.shape[0]}, {seconds:.1f} s)")


def _naming(job: Job, error: Exception) -> str:
    """The message, with the picture's name in front unless it is in there."""
    message = one_line(error)
    return message if str(job.source) in message or str(job.target) in message else f"{job.source}: {message}"
