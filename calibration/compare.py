"""Compares quantization methods on one model: the same data and number of steps, each on its own grid, learning rates swept.

    python calibration/compare.py tiny-fp --data PHOTOS --evaluate OTHERS --steps 60 --bits w4a4 w2a2 --output FOLDER

A cell is one method at one bit width with one seed. Finished cells are JSON files in FOLDER/cells, and are not made again: call
the same command again after Ctrl-C or a crash. At the end, or with --table-only, FOLDER gets comparison.md, comparison.json and a
sheet of pictures for each bit width. Nothing is ever chosen on the photographs of --evaluate but which cells get more seeds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its own folder must not shadow the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from calibration.comparison.cells import full_precision, run_cell
from calibration.comparison.learning_rate import StoppedError
from calibration.comparison.methods import EXTRA_BITS, MAIN, Cell, Method, make_method, method_names
from calibration.comparison.setting import Comparison, load_model
from calibration.comparison.table import read_cells, write_tables
from qartsr_pipeline.calibration.data.fingerprint import check_no_overlap, data_fingerprint, file_digests, overlap
from qartsr_pipeline.calibration.data.pairs import choose_held_out
from qartsr_pipeline.calibration.data.patches import PhotographPatches
from qartsr_pipeline.calibration.data.photographs import list_photographs
from qartsr_pipeline.calibration.evaluation.perceptual_metrics import NAMES, load_metrics
from qartsr_pipeline.calibration.recipe import check_quantizes, parse_bits
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.cli.device import choose_device

HELD_OUT = 8  # photographs of --data that are not calibrated on: they choose the learning rate
REPEATED = 3  # so many of the best methods are repeated with further seeds
BESIDE_MAIN = 2  # so many of the best other methods are also measured on the model before TRQ


def first_cells(methods: list[Method], bits: list[str]) -> list[Cell]:
    """Every method at every bit width, and what a method's own publication is about."""
    cells = [Cell(method, width) for width in bits for method in methods]
    extra = [Cell(method, EXTRA_BITS[method.name]) for method in methods if method.name in EXTRA_BITS]
    return cells + [cell for cell in extra if cell not in cells]


def further_cells(done: dict[Cell, dict[str, Any]], seeds: int, before_trq: bool) -> list[Cell]:
    """The best methods with further seeds, and the main one and the best others on the model before TRQ."""
    cells = []
    for bits in dict.fromkeys(cell.bits for cell in done):
        rivals = [cell for cell in done if cell.bits == bits and cell.method.kind == "method"]
        if len(rivals) < 2:
            continue
        ranked = sorted(rivals, key=lambda cell: -done[cell]["metrics"]["wavelet"]["psnr_y_to_full_precision"])
        cells += [replace(cell, seed=seed) for cell in ranked[:REPEATED] for seed in range(1, seeds)]
        if before_trq:
            main = [cell for cell in ranked if cell.method.name == MAIN]
            others = [cell for cell in ranked if not cell.method.name.startswith(MAIN)][:BESIDE_MAIN]
            cells += [replace(cell, model="t999") for cell in main + others]
    return cells


def prepare(args: argparse.Namespace) -> Comparison:
    """Checks the arguments and loads models and data.

    Raises:
        ValueError, OSError, ImportError: the message says which argument is wrong.
    """
    device, _ = choose_device(args.device)
    paths, evaluation = list_photographs(args.data), list_photographs(args.evaluate)[: args.limit]
    seen = overlap(evaluation, file_digests(paths))
    if seen:
        raise ValueError(f"{seen[0]} is among the photographs of --data: evaluate on others")
    if len(paths) <= HELD_OUT:
        raise ValueError(f"{args.data} has {len(paths)} photographs; more than {HELD_OUT} are needed, which are held out")
    load_metrics(args.metrics, device)
    held_out = choose_held_out(paths, HELD_OUT)
    names = {"": args.model} | ({"t999": args.model_t999} if args.model_t999 else {})
    for name in names.values():
        check_no_overlap(evaluation, fetch(name))
    models = {name: load_model(folder, device) for name, folder in names.items()}
    data = {"calibration": data_fingerprint(paths), "evaluation": data_fingerprint(evaluation), "degradation": "bicubic"}
    patches = PhotographPatches([path for path in paths if path not in set(held_out)])
    return Comparison(args.output, models, patches, held_out, evaluation, data, args.metrics, device)


def run(args: argparse.Namespace) -> None:
    """Makes what is missing, then the tables."""
    if not args.table_only:
        methods = [make_method(name, args.steps) for name in args.methods]
        comparison = prepare(args)
        for name in comparison.models:
            full_precision(comparison, name)
        done = run_cells(comparison, first_cells(methods, args.bits))
        run_cells(comparison, further_cells(done, args.seeds, "t999" in comparison.models))
        shutil.rmtree(comparison.output / "states", ignore_errors=True)
    print(write_tables(args.output))


def run_cells(comparison: Comparison, cells: list[Cell]) -> dict[Cell, dict[str, Any]]:
    """Runs the cells one after another and says what came out of each; those whose training diverges have no entry."""
    done = {}
    for number, cell in enumerate(cells, 1):
        try:
            done[cell] = content = run_cell(comparison, cell)
        except FloatingPointError as error:  # one method's failure is no reason to leave out the others
            print(f"{number}/{len(cells)} {cell.key} is left out of the tables: {' '.join(str(error).split())}", flush=True)
            continue
        metrics, factor = content["metrics"]["wavelet"], content["learning_rate"]["factor"]
        rate = "" if factor is None else f", learning rate x{factor:g}"
        print(
            f"{number}/{len(cells)} {cell.key}: {metrics['psnr_y_to_full_precision']:.2f} dB to full precision, "
            f"{metrics['psnr_y']:.2f} dB{rate}, {content['seconds']:.0f} s",
            flush=True,
        )
    return done


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="tiny-fp", help="full-precision checkpoint: folder, shipped name or Hub id")
    parser.add_argument("--data", help="folder of photographs to calibrate on")
    parser.add_argument("--evaluate", help="folder of other photographs to measure on")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of every method that trains (default: 60)")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w3a3", "w2a2"], metavar="BITS", type=str.lower)
    parser.add_argument("--methods", nargs="+", default=list(method_names()), choices=method_names(), metavar="NAME",
                        help=f"of {', '.join(method_names())} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1, help=f"of the best {REPEATED} methods at each bit width (default: 1)")
    parser.add_argument("--model-t999", metavar="MODEL", help="the model before TRQ, for the main method and the best two others")
    parser.add_argument("--limit", type=int, help="only so many photographs of --evaluate, the first by name")
    parser.add_argument(
        "--metrics", nargs="+", default=[], metavar="NAME", help=f"further ones, by pyiqa: {', '.join(NAMES)}, .."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of cells and tables")
    parser.add_argument("--table-only", action="store_true", help="only write the tables of what is finished")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message of one line if arguments make no sense."""
    if args.table_only:
        if not read_cells(args.output):
            parser.error(f"{args.output / 'cells'} has no finished cells")
        return
    for name in ("data", "evaluate"):
        if not getattr(args, name):
            parser.error(f"--{name} is needed, a folder of photographs")
    for name, least in (("steps", 1), ("seeds", 1), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} is {value}, expected at least {least}")
    for text in args.bits:
        try:
            check_quantizes(parse_bits(text))
        except ValueError as error:
            parser.error(f"--bits: {error}")


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        check(parser, args)
        run(args)
    except (StoppedError, KeyboardInterrupt):
        parser.exit(130, "\nstopped; what is finished is kept. Continue with the same command.\n")
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
