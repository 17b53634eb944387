"""`qartsr upscale`: picture files in, enlarged picture files out. One that fails does not stop the others."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qartsr_pipeline.checkpoint_files import fetch, quantization_configs
from qartsr_pipeline.cli.arguments import add_debug, add_device_and_dtype, add_model_option
from qartsr_pipeline.cli.jobs import Job, is_done, plan_jobs, sort_out
from qartsr_pipeline.cli.messages import one_line
from qartsr_pipeline.cli.processes import Processes, join_processes
from qartsr_pipeline.cli.progress import Counts, picture_bar, say
from qartsr_pipeline.image_files import check_writable, make_folder, read_image, write_image

if TYPE_CHECKING:
    from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("upscale", description="Enlarges images.")
    parser.add_argument("inputs", nargs="+", metavar="IN", help="image files, and folders of them")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="file, or folder for several images; default: photo_x4.png beside photo.jpg. The suffix chooses the format",
    )
    add_model_option(parser)
    parser.add_argument("--upscale", type=float, default=4.0, metavar="FACTOR", help="above 0 and up to 16; default: 4")
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels of the enlarged image; default: by free memory")
    parser.add_argument("--tile-overlap", type=int, metavar="N", help="default: a quarter of the tile, at most 128")
    parser.add_argument("--color-fix", choices=("wavelet", "adain", "none"), default="wavelet", help="default: wavelet")
    add_device_and_dtype(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that exist; without it a folder's finished images are skipped"
    )
    add_debug(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 2 if any picture failed, in whichever process."""
    jobs = plan_jobs(options.inputs, options.output, options.upscale)
    processes = join_processes(options.device)
    # One list for all: another process may look at the folders later, when some outputs are there already.
    plan = processes.of_main(sort_out(jobs, options.overwrite))
    if processes.is_main:
        for refusal in plan.refusals:
            say(f"qartsr: error: {refusal}", error=True)
        if plan.skipped:
            say(f"{plan.skipped} of {len(jobs)} pictures are skipped: their output exists already (--overwrite redoes them)")
    counts = _upscale_files(processes.share(plan.pending), options, processes)
    counts = sum(processes.gather(counts), Counts(skipped=plan.skipped, failed=len(plan.refusals)))
    if len(jobs) > 1 and processes.is_main:
        say(str(counts))
    return 2 if counts.failed else 0


def load_pipeline(options: argparse.Namespace, processes: Processes) -> QArtSRPipeline:
    """Loads the checkpoint, choosing device and float type, and prints the choices with their reasons."""
    folder = fetch(options.model)
    # Imported only now: a checkpoint that does not exist is reported without waiting for torch.
    from qartsr_pipeline.cli.device import choose_device, choose_dtype
    from qartsr_pipeline.cli.loading import load_quietly

    device, why_device = choose_device(options.device, processes.device)
    dtype, why_dtype = choose_dtype(options.dtype, device)
    pipeline = load_quietly(folder, dtype=dtype).to(device)
    # None: no bar where nobody watches
    pipeline.set_progress_bar_config(desc="tiles", leave=False, disable=None if processes.is_local_main else True)
    if processes.is_local_main:
        say(
            f"model: {folder} (quantized: {', '.join(quantization_configs(folder)) or 'nothing, this is a full-precision model'})"
        )
    number = "" if processes.count == 1 else f"process {processes.index + 1} of {processes.count}: "
    say(f"{number}device: {device} ({why_device}); dtype: {str(dtype).removeprefix('torch.')} ({why_dtype})")
    return pipeline


def _upscale_files(jobs: Sequence[Job], options: argparse.Namespace, processes: Processes) -> Counts:
    counts = Counts()
    if not jobs:
        return counts
    pipeline = load_pipeline(options, processes)
    arguments = {
        "upscale": options.upscale,
        "tile_size": options.tile_size,
        "tile_overlap": options.tile_overlap,
        "color_fix": None if options.color_fix == "none" else options.color_fix,
    }
    pipeline.check_inputs(**arguments)
    with picture_bar(jobs, processes) as bar:
        for job in jobs:
            try:
                if is_done(job, options.overwrite):  # by another run at the same time
                    counts.skipped += 1
                else:
                    _upscale_file(pipeline, job, arguments, may_create_folder=options.output is not None)
                    counts.written += 1
            except Exception as error:
                counts.failed += 1
                if options.debug:
                    traceback.print_exc()
                say(f"qartsr: error: {_naming(job, error)}", error=True)
            bar.update()
    return counts


def _upscale_file(pipeline: QArtSRPipeline, job: Job, arguments: dict, may_create_folder: bool) -> None:
    from qartsr_pipeline.image.resize import enlarged_size

    start = time.perf_counter()
    source = read_image(job.source)
    height, width = enlarged_size(source.pixels.shape[:2], arguments["upscale"])
    if may_create_folder:
        make_folder(job.target.parent)
    check_writable(job.target, (width, height))  # before the work, not after it
    result = pipeline(source.pixels, output_type="np", **arguments).images[0]
    for notice in source.notices + write_image(job.target, result, source):
        say(f"note: {notice}")
    seconds = time.perf_counter() - start
    say(f"{job.source} -> {job.target} ({result.shape[1]} x {result.shape[0]}, {seconds:.1f} s)")


def _naming(job: Job, error: Exception) -> str:
    """The message, with the picture's name in front unless it is in there."""
    message = one_line(error)
    return message if str(job.source) in message or str(job.target) in message else f"{job.source}: {message}"
