"""`qartsr evaluate`: its arguments. What it does stands in `evaluate_models`.

    qartsr evaluate tiny-fp tiny-w8a8 tiny-w4a4 --data PHOTOS --output report.json
    qartsr evaluate reproduce --ours report.json

The folder holds high-resolution photographs, or pairs as DIV2K and RealSR lay them out (see calibration/evaluation/originals.py),
or clips: video files, or a folder of images for each. `reproduce` prints what the papers report, beside ours.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from qartsr_pipeline.calibration.data import DEGRADATION_NAMES
from qartsr_pipeline.cli.arguments import DEVICE_HELP, add_debug, add_outputs, count, device_name
from qartsr_pipeline.cli.messages import UsageError

REPRODUCE = "reproduce"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "evaluate",
        description="Measures models on a folder of photographs or clips, against bicubic enlargement and full precision.",
        epilog="`reproduce [--ours REPORT.json ..]` instead of models prints what the papers report, beside ours.",
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="checkpoint folder, shipped name or Hub id; full precision first")
    add("--data", type=Path, help="folder of high-resolution photographs, of pairs, or of clips")
    add(
        "--clips",
        action="store_true",
        help="--data holds clips: video files, or a folder of images for each (video models imply it)",
    )
    add("--frames", type=count, help="only so many frames of each clip")
    add("--no-ground-truth", action="store_true", help="--data holds low-resolution images: see docs/evaluation.md")
    add("--color-fix", choices=("wavelet", "adain"), help="colour alignment of images (default: wavelet)")
    add(
        "--degradation",
        choices=DEGRADATION_NAMES,
        default="bicubic",
        help="of photographs that come alone (default: bicubic)",
    )
    add("--no-color-fix", action="store_true", help="only the networks' own colours (default: images both, clips aligned)")
    add("--tile-size", type=count, help="side of the tiles in enlarged pixels (default: no tiles)")
    add("--limit", type=count, help="only so many photographs or clips, the first by name")
    add("--bypass", action="store_true", help="also full-precision models without UNet, and their autoencoder")
    add(
        "--metrics",
        nargs="+",
        default=[],
        metavar="NAME",
        help="beside psnr_y, ssim_y: lpips, lpips_vgg, dists, pyiqa's; e_warp of clips",
    )
    add("--backbones", type=Path, metavar="FOLDER", help="with the backbones of LPIPS and DISTS (default: found or downloaded)")
    add("--lanczos", action="store_true", help="also Lanczos enlargement")
    add_outputs(parser, "NAME=FOLDER", "also what other programs made of them, in files called like the photographs")
    add("--realesrgan", type=Path, metavar="FOLDER", help="also Real-ESRGAN x4plus, with its weights there, through ncnn")
    add("--output", type=Path, help="the JSON report; the table is written beside it as .md")
    add("--pictures", type=Path, metavar="FOLDER", help="write comparison images there, film strips of clips")
    add("--device", type=device_name, default="auto", metavar="DEVICE", help=DEVICE_HELP)
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: float32")
    add("--ours", nargs="+", default=[], metavar="REPORT.json", help="with reproduce: written by --output")
    add_debug(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the table, and writes it with its report where that is asked for; returns 0."""
    papers = options.models == [REPRODUCE]
    if not papers and options.data is None:
        raise UsageError("--data is needed: a folder of high-resolution photographs, or of pairs")
    if not papers and not (options.models or options.lanczos or options.outputs or options.realesrgan):
        raise UsageError("nothing to measure: give a model, --lanczos, --outputs or --realesrgan")
    if not papers and options.ours:
        raise UsageError(f"--ours goes with `{REPRODUCE}` alone: leave it out")
    from qartsr_pipeline.cli.evaluate_clips import measure_clips, of_clips
    from qartsr_pipeline.cli.evaluate_models import Request, compare_with_papers, evaluate_and_write, measure_images

    if papers:
        compare_with_papers(options.ours)
    else:
        request = Request(**{field.name: getattr(options, field.name) for field in fields(Request)})
        evaluate_and_write(request, measure_clips if of_clips(request) else measure_images)
    return 0
