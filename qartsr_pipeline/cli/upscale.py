"""`qartsr upscale`: image files in, enlarged image files out. One that fails does not stop the others."""

from __future__ import annotations

import argparse

from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.cli.arguments import add_debug, add_device_and_dtype, add_model_option
from qartsr_pipeline.cli.jobs import FORMATS, OutputOptions, plan_jobs, sort_out
from qartsr_pipeline.cli.messages import Counts, say
from qartsr_pipeline.cli.processes import join_processes
from qartsr_pipeline.image_files import DEFAULT_QUALITY


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("upscale", description="Enlarges images.")
    parser.add_argument("inputs", nargs="+", metavar="IN", help="image files, folders of them, and patterns such as '*.png'")
    parser.add_argument("-r", "--recursive", action="store_true", help="search the folders within folders, too")
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="file, or folder for several images; default: photo_x4.png beside photo.jpg. A file's suffix chooses its format",
    )
    parser.add_argument(
        "--format", choices=FORMATS, help="of results that get their name here; same: the input's; default: png (lossless)"
    )
    parser.add_argument("--quality", type=_quality, metavar="N", help=f"of JPEG and WebP, 1 to 100; default: {DEFAULT_QUALITY}")
    add_model_option(parser)
    parser.add_argument("--upscale", type=float, default=4.0, metavar="FACTOR", help="above 0 and up to 16; default: 4")
    parser.add_argument("--tile-size", type=int, metavar="N", help="pixels of the enlarged image; default: by free memory")
    parser.add_argument("--tile-overlap", type=int, metavar="N", help="default: a quarter of the tile, at most 128")
    parser.add_argument("--color-fix", choices=("wavelet", "adain", "none"), default="wavelet", help="default: wavelet")
    parser.add_argument(
        "--keep-hidden-colors",
        action="store_true",
        help="enlarge colours under transparency as they are, for textures; default: they become those of visible neighbours",
    )
    add_device_and_dtype(parser)
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files that exist; without it a folder's finished images are skipped"
    )
    add_debug(parser)
    parser.set_defaults(run=run)


def _quality(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 100, but is {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Returns 0, or 2 if any image failed, in whichever process."""
    output = OutputOptions(options.output, options.format, options.quality, options.overwrite)
    jobs, left_out = plan_jobs(options.inputs, options.upscale, output, options.recursive)
    processes = join_processes(options.device)
    # One list for all: another process may look at the folders later, when some outputs are there already.
    plan = processes.of_main(sort_out(jobs, output.overwrite))
    if processes.is_main:
        for refusal in plan.refusals:
            say(f"qartsr: error: {refusal}", error=True)
        if plan.skipped:
            say(f"{plan.skipped} of {len(jobs)} images are skipped: their output exists already (--overwrite redoes them)")
    counts, pending = Counts(), processes.share(plan.pending)
    if pending:
        folder = fetch(options.model)
        # Imported only now: neither a finished folder nor a checkpoint that does not exist needs torch.
        from qartsr_pipeline.cli.upscale_images import ModelOptions, load_pipeline, upscale_images

        pipeline = load_pipeline(folder, options.device, options.dtype, processes)
        model_options = ModelOptions(
            options.upscale,
            options.tile_size,
            options.tile_overlap,
            None if options.color_fix == "none" else options.color_fix,
            options.keep_hidden_colors,
        )
        counts = upscale_images(pipeline, pending, model_options, output, processes, options.debug)
    counts = sum(processes.gather(counts), Counts(0, plan.skipped, len(plan.refusals), tuple(plan.refusals)))
    if processes.is_main:
        for line in [*left_out, *(counts.summary() if len(jobs) > 1 else [])]:
            say(line)
    return 2 if counts.failed else 0
