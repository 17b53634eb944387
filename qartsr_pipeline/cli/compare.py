"""`qartsr compare`: photographs enlarged by several models, on one HTML page with a slider between any two results.

qartsr compare photo.jpg --models tiny-fp tiny-w4a4 --outputs real-esrgan=photo_esrgan.png -o page.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT
from qartsr_pipeline.cli.arguments import add_debug, add_device_and_dtype, add_outputs, list_shipped
from qartsr_pipeline.cli.messages import UsageError, say


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser(
        "compare", description="Enlarges photographs with several models and writes a page to compare the results on."
    )
    add = parser.add_argument
    add("photographs", nargs="+", metavar="PHOTO", help="image files")
    add(
        "--models",
        nargs="+",
        action="extend",
        metavar="MODEL",
        help=f"folder, shipped name (below) or Hub id; default: {DEFAULT_CHECKPOINT}; none where only --outputs are given",
    )
    what = "what other programs made of them: a file, or a folder with files called like the photographs"
    add_outputs(parser, "NAME=PATH", what)
    add("-o", "--output", type=Path, default=Path("compare.html"), metavar="PAGE.html", help="default: compare.html")
    add(
        "--scale", "--upscale", dest="upscale", type=float, default=4.0, metavar="FACTOR", help="above 0 and up to 16; default: 4"
    )
    add("--tile-size", type=int, metavar="N", help="pixels of the enlarged image; default: by free memory")
    add_device_and_dtype(parser)
    add("--overwrite", action="store_true", help="replace the page if it exists")
    add_debug(parser)
    list_shipped(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes the page, prints its path and size and each model's seconds; returns 0."""
    outputs = dict(options.outputs)
    if len(outputs) < len(options.outputs):
        raise UsageError("--outputs: a name is given twice. Give each program a name of its own.")
    models = options.models or ([] if outputs else [DEFAULT_CHECKPOINT])
    from tqdm import tqdm

    from qartsr_pipeline.calibration.evaluation.comparison import compare
    from qartsr_pipeline.cli.device import choose_device, choose_dtype

    device, why_device = choose_device(options.device)
    dtype, why_dtype = choose_dtype(options.dtype, device)
    if models:
        say(f"device: {device} ({why_device}); dtype: {str(dtype).removeprefix('torch.')} ({why_dtype})")
    with tqdm(unit="image", leave=False, disable=None) as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(name, refresh=False)
            bar.update(done - bar.n)

        written = compare(
            options.photographs,
            models,
            options.output,
            outputs=outputs,
            upscale=options.upscale,
            tile_size=options.tile_size,
            device=device,
            dtype=dtype,
            overwrite=options.overwrite,
            progress=show,
        )
    for notice in written.notices:
        say(f"note: {notice}")
    for name, seconds in written.seconds.items():
        say(f"{name}: {', '.join(f'{each:.2f}' for each in seconds)} s")
    count = f"{len(options.photographs)} x {1 + len(models) + len(outputs)} images"
    say(f"written: {written.path} ({written.size / 1e6:.1f} MB, {count}); open it in a browser")
    return 0
