"""Evaluates models on a folder of pictures against bicubic enlargement and full precision.

    python calibration/evaluate.py tiny-fp tiny-w8a8 tiny-w4a4 --data PHOTOS --output report.json
    python calibration/evaluate.py reproduce --ours report.json

The folder holds high-resolution photographs, or pairs as DIV2K and RealSR lay them out (see calibration/data/paired_folders.py).
A photograph alone is cut to multiples of 4, reduced 4 times with bicubic resampling, or as --degradation says, and rounded to 8
bits; the models enlarge it again. Results are rounded to 8 bits, PSNR and SSIM are those of the BT.601 luma without a border of
4 pixels. When the first model is full precision, the others are compared with it as well. `reproduce` prints what the papers
report, beside ours.
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

from calibration.comparison.reported_results import reproduce
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import check_no_overlap, data_fingerprint, hardware, versions
from qartsr_pipeline.calibration.data.paired_folders import HR_ONLY, find_pairs
from qartsr_pipeline.calibration.data.photographs import as_pixels
from qartsr_pipeline.calibration.evaluation.evaluation import evaluate_pipelines, load_candidates, row_names
from qartsr_pipeline.calibration.evaluation.evaluation_report import markdown, summarize
from qartsr_pipeline.calibration.evaluation.perceptual_metrics import NAMES, load_metrics
from qartsr_pipeline.calibration.saving import write_whole
from qartsr_pipeline.calibration.start.warm_start import record_of_folder
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.image.comparison import compare
from qartsr_pipeline.image_files import PictureFile, make_folder, write_picture


def evaluate(args: argparse.Namespace) -> dict:
    """Runs what the command line asks for; returns the report that is written as JSON."""
    device, _ = choose_device(args.device)
    layout, pairs = find_pairs(args.data)
    pairs = pairs[: args.limit]
    originals, files = [pair.high for pair in pairs], [path for pair in pairs for path in pair.files]
    metrics = load_metrics(args.metrics, device)
    if args.output:
        check_output(Path(args.output))
    if args.pictures:
        make_folder(args.pictures)
    names, folders = row_names(args.models), {model: fetch(model) for model in args.models}
    unseen = {model: check_no_overlap(files, folder) for model, folder in folders.items()}
    makers = {names[model]: made_by(folder) for model, folder in folders.items()}
    candidates = load_candidates(args.models, getattr(torch, args.dtype), device)
    color_fixes = [None] if args.no_color_fix else [args.color_fix, None]
    made: dict[str, torch.Tensor] = {}
    with tqdm(total=len(pairs) * (1 + len(candidates)), unit="picture", mininterval=1) as bar:

        def collect(path: Path, name: str, output: torch.Tensor) -> None:
            made[name] = output
            if name != "original":
                bar.set_postfix_str(path.name, refresh=False)
                bar.update()
                return
            if args.pictures:
                write_comparison(picture_path(args, path), made)
            made.clear()

        options = {"made": collect, "degradation": args.degradation}
        rows = evaluate_pipelines(candidates, pairs, color_fixes, args.tile_size, args.bypass, metrics, **options)
    return {
        "data": {
            "folder": Path(args.data).resolve().name,
            "layout": layout,
            **data_fingerprint(files),
            "count": len(pairs),
            "pictures": [path.name for path in originals],
            "comparisons": [picture_path(args, path).name for path in originals] if args.pictures else [],
            "unseen_by_record": {names[model]: checked for model, checked in unseen.items()},
        },
        "made_by": makers,
        "settings": {
            "scale": 4,
            "degradation": f"{args.degradation}, 8 bits" if layout == HR_ONLY else f"as the {layout} folder gives it",
            "border": 4,
            "tile_size": args.tile_size,
            "dtype": args.dtype,
        },
        "hardware": hardware(device),
        "versions": versions(),
        "rows": summarize(rows),
    }


def made_by(folder: Path) -> dict[str, str]:
    """Method and bits that a folder's record names, as "method" and "bits"; nothing where it is not of this program's kind."""
    record = record_of_folder(folder)
    method = record["recipe"].get("method") if isinstance(record.get("recipe"), dict) else None
    bits = record.get("bits")
    return {"method": method, "bits": bits.lower()} if isinstance(method, str) and isinstance(bits, str) else {}


def picture_path(args: argparse.Namespace, original: Path) -> Path:
    """Where the comparison of an original goes; sub-folders may hold the same name."""
    return Path(args.pictures) / "_".join(original.relative_to(args.data).with_suffix(".png").parts)


def check_output(path: Path) -> None:
    """Says at the start, not after an hour, that the report cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"--output {path}: not a file name in a folder that can be written to")
    if path.suffix == ".md":
        raise ValueError(f"--output {path}: name the JSON file; the Markdown one is written beside it")


def write_report(path: Path, report: dict, text: str) -> None:
    """Writes the report as JSON and, beside it, as Markdown, each whole or not at all."""
    content = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, content.encode())
    write_whole(path.with_suffix(".md"), text.encode())


def report_text(report: dict, metrics: list[str], pictures: Path | None, beside: Path | None) -> str:
    """The report as Markdown: what was measured, the table, and links to the comparison pictures.

    Args:
        pictures, beside: their folder and that of the report, when both are written.
    """
    data, settings = report["data"], report["settings"]
    unchecked = [model for model, listed in data["unseen_by_record"].items() if not listed]
    lines = [
        f"{data['count']} pictures of {data['folder']}, low resolution: {settings['degradation']}. {report['hardware']},"
        f" {settings['dtype']}, {'tiles of ' + str(settings['tile_size']) if settings['tile_size'] else 'no tiles'}.",
        "",
        markdown(report["rows"], tuple(metrics)),
    ]
    if unchecked:
        lines += [
            "",
            f"The records of {', '.join(unchecked)} list no files: whether these pictures were trained on is not checked.",
        ]
    if pictures and beside:
        folder = Path(os.path.relpath(pictures, beside))
        lines += [f"\n![{name}](<{(folder / name).as_posix()}>)" for name in data["comparisons"]]
    return "\n".join(lines) + "\n"


def read_report(path: str) -> dict:
    """A report that this program wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = {"data", "settings", "rows"} <= report.keys()
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"--ours {path}: not a report of calibration/evaluate.py; one is written with --output")
    return report


def write_comparison(path: Path, pictures: dict[str, torch.Tensor]) -> None:
    """Pictures, each (1, 3, H, W) in [0, 1], side by side under their names, with the middle third of each enlarged below."""
    height, width = next(iter(pictures.values())).shape[-2:]
    detail = (width // 3, height // 3, width // 3 + max(1, width // 3), height // 3 + max(1, height // 3))
    pixels = {name: as_pixels(picture) for name, picture in pictures.items()}
    sheet = compare(pixels, detail)
    write_picture(path, sheet.astype(np.float32) / 255, PictureFile(sheet))


def count(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="`evaluate.py reproduce [--ours REPORT.json ..]` prints what the papers report, beside ours.",
    )
    parser.add_argument(
        "models", nargs="+", metavar="MODEL", help="checkpoint folder, shipped name or Hub id; full precision first"
    )
    parser.add_argument("--data", required=True, help="folder of high-resolution photographs, or of pairs")
    parser.add_argument(
        "--color-fix", choices=("wavelet", "adain"), default="wavelet", help="colour alignment (default: wavelet)"
    )
    parser.add_argument(
        "--degradation", choices=tuple(DEGRADATIONS), default="bicubic", help="of photographs that come alone (default: bicubic)"
    )
    parser.add_argument("--no-color-fix", action="store_true", help="only the networks' own colours (default: both)")
    parser.add_argument("--tile-size", type=count, help="side of the tiles in enlarged pixels (default: no tiles)")
    parser.add_argument("--limit", type=count, help="only so many photographs, the first by name")
    parser.add_argument("--bypass", action="store_true", help="also full-precision models without UNet, and their autoencoder")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help=f"further ones, by pyiqa: {', '.join(NAMES)}, .."
    )
    parser.add_argument("--output", help="the JSON report; the table is written beside it as .md")
    parser.add_argument("--pictures", metavar="FOLDER", help="write comparison pictures there")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return parser


def reproduce_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="evaluate.py reproduce", description="Prints what the papers report, beside ours.")
    parser.add_argument("--ours", nargs="+", default=[], metavar="REPORT.json", help="written by evaluate.py --output")
    return parser


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["reproduce"]:
        parser = reproduce_arguments()
        args = parser.parse_args(argv[1:])
        try:
            reports = [read_report(path) for path in args.ours]
        except (OSError, ValueError) as error:
            parser.error(" ".join(str(error).split()))
        print(reproduce(reports))
        return
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        report = evaluate(args)
        output, pictures = (Path(path) if path else None for path in (args.output, args.pictures))
        text = report_text(report, args.metrics, pictures, output.parent if output else None)
        if output:
            write_report(output, report, text)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))
    print(report_text(report, args.metrics, None, None), end="")
    for written in filter(None, (output, output and output.with_suffix(".md"), pictures)):
        print(f"\nwritten: {written}")


if __name__ == "__main__":
    main()
