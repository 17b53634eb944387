"""Evaluates models on a folder of high-resolution photographs against bicubic enlargement and full precision.

    python calibration/evaluate.py tiny-fp tiny-w8a8 tiny-w4a4 --data PHOTOS --output report.json

Every photograph is cut to multiples of 4, reduced 4 times with bicubic resampling and rounded to 8 bits; the models enlarge it
again. Results are rounded to 8 bits, PSNR and SSIM are those of the BT.601 luma without a border of 4 pixels. When the first
model is full precision, the others are compared with it as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a script: its own folder must not shadow the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from calibration.data.fingerprint import data_fingerprint, hardware, versions
from calibration.data.photographs import list_photographs
from calibration.evaluation import Evaluation, load_candidates, read_original
from calibration.evaluation_report import markdown, summarize
from calibration.perceptual_metrics import NAMES, load_metrics
from qartsr_pipeline.command_line.device import choose_device
from qartsr_pipeline.image.comparison import compare
from qartsr_pipeline.picture_files import PictureFile, make_folder, write_picture


def evaluate(args: argparse.Namespace) -> dict:
    """Runs what the command line asks for; returns the report that is written as JSON."""
    device, _ = choose_device(args.device)
    paths = list_photographs(args.data)[: args.limit]
    metrics = load_metrics(args.metrics, device)
    if args.output:
        check_output(Path(args.output))
    if args.pictures:
        make_folder(args.pictures)
    candidates = load_candidates(args.models, getattr(torch, args.dtype), device)
    color_fixes = [None] if args.no_color_fix else [args.color_fix, None]
    evaluation = Evaluation(candidates, color_fixes, args.tile_size, args.bypass, metrics)
    with tqdm(total=len(paths) * (1 + len(candidates)), unit="picture", mininterval=1) as bar:
        for path in paths:
            bar.set_postfix_str(path.name, refresh=False)
            high = read_original(path)
            made = {}
            try:
                for name, output in evaluation.picture(high):
                    made[name] = output
                    bar.update()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            if args.pictures:
                name = "_".join(path.relative_to(args.data).with_suffix(".png").parts)  # sub-folders may hold the same name
                write_comparison(Path(args.pictures) / name, made | {"original": high})
    return {
        "data": {"folder": Path(args.data).name, **data_fingerprint(paths), "pictures": [path.name for path in paths]},
        "settings": {"scale": 4, "degradation": "bicubic, 8 bits", "border": 4, "tile_size": args.tile_size, "dtype": args.dtype},
        "hardware": hardware(device),
        "versions": versions(),
        "rows": summarize(list(evaluation.rows.values())),
    }


def check_output(path: Path) -> None:
    """Says at the start, not after an hour, that the report cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"--output {path}: not a file name in a folder that can be written to")


def write_report(path: Path, report: dict) -> None:
    """Writes the report as JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_comparison(path: Path, pictures: dict[str, torch.Tensor]) -> None:
    """Pictures, each (1, 3, H, W) in [0, 1], side by side under their names, with the middle third of each enlarged below."""
    height, width = next(iter(pictures.values())).shape[-2:]
    detail = (width // 3, height // 3, width // 3 + max(1, width // 3), height // 3 + max(1, height // 3))
    pixels = {name: np.rint(picture[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8) for name, picture in pictures.items()}
    sheet = compare(pixels, detail)
    write_picture(path, sheet.astype(np.float32) / 255, PictureFile(sheet))


def count(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoint folder, shipped name or Hub id; full precision first"
    )
    parser.add_argument("--data", required=True, help="folder of high-resolution photographs")
    parser.add_argument(
        "--color-fix", choices=("wavelet", "adain"), default="wavelet", help="colour alignment (default: wavelet)"
    )
    parser.add_argument("--no-color-fix", action="store_true", help="only the networks' own colours (default: both)")
    parser.add_argument("--tile-size", type=count, help="side of the tiles in enlarged pixels (default: no tiles)")
    parser.add_argument("--limit", type=count, help="only so many photographs, the first by name")
    parser.add_argument("--bypass", action="store_true", help="also full-precision models without UNet, and their autoencoder")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help=f"further ones, by pyiqa: {', '.join(NAMES)}, .."
    )
    parser.add_argument("--output", help="the JSON report")
    parser.add_argument("--pictures", metavar="FOLDER", help="write comparison pictures there")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        report = evaluate(args)
        if args.output:
            write_report(Path(args.output), report)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))
    print(f"{report['data']['count']} pictures of {report['data']['folder']}, {report['hardware']}, {args.dtype}\n")
    print(markdown(report["rows"], tuple(args.metrics)))
    for written in filter(None, (args.output, args.pictures)):
        print(f"\nwritten: {written}")


if __name__ == "__main__":
    main()
