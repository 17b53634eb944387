"""Compares quantization methods on one model: the same data and number of steps, each on its own grid, learning rates swept.

    python -m calibration.compare tiny-fp --data PHOTOS --evaluate OTHERS --steps 60 --bits w4a4 w2a2 --output FOLDER

A cell is one method at one bit width with one seed. Finished cells are JSON files in FOLDER/cells and are not made again: give
the same command again after Ctrl-C or a crash. At the end, or with --table-only, FOLDER gets comparison.md, comparison.json and a
sheet of images for each bit width. The photographs of --evaluate decide nothing but which cells get more seeds.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.comparison.cells import full_precision, run_cell
from calibration.comparison.methods import EXTRA_BITS, MAIN, Cell, Method, make_method, method_names
from calibration.comparison.setting import Comparison, Sources, prepare
from calibration.comparison.table import read_cells, write_tables
from qartsr_pipeline.calibration.evaluation.metrics import NAMES
from qartsr_pipeline.calibration.recipe import check_quantizes, parse_bits
from qartsr_pipeline.calibration.training.progress import Stopped
from qartsr_pipeline.cli.arguments import DEVICE_HELP, device_name

REPEATED = 3  # so many of the best methods are repeated with further seeds
BESIDE_MAIN = 2  # so many of the best other methods are also measured on the model before TRQ


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see `arguments`."""

    sources: Sources
    methods: list[str]
    bits: list[str]
    steps: int
    seeds: int


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


def run(request: Request) -> str:
    """Makes the cells that are missing, then the tables; returns their text."""
    methods = [make_method(name, request.steps) for name in request.methods]
    comparison = prepare(request.sources)
    for name in comparison.models:
        full_precision(comparison, name)
    done = run_cells(comparison, first_cells(methods, request.bits))
    run_cells(comparison, further_cells(done, request.seeds, "t999" in comparison.models))
    shutil.rmtree(comparison.output / "states", ignore_errors=True)
    return write_tables(comparison.output)


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
    description = "Compares quantization methods on one model: the same data and number of steps, each on its own grid."
    parser = argparse.ArgumentParser(prog="python -m calibration.compare", description=description)
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
    parser.add_argument("--device", type=device_name, default="auto", help=DEVICE_HELP)
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
    check_numbers(parser, args, "steps", "seeds", "limit")


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """The same for the numbers of these names, which must be at least 1 where they are given, and for --bits."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    for text in args.bits:
        try:
            check_quantizes(parse_bits(text))
        except ValueError as error:
            parser.error(f"--bits: {error}")


def request_of(args: argparse.Namespace) -> Request:
    """Checked arguments as a request."""
    models = {"": args.model} | ({"t999": args.model_t999} if args.model_t999 else {})
    sources = Sources(models, args.data, args.evaluate, args.output, args.limit, tuple(args.metrics), args.device)
    return Request(sources, args.methods, args.bits, args.steps, args.seeds)


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with 2 and one line for errors, with 130 when interrupted."""
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        check(parser, args)
        print(write_tables(args.output) if args.table_only else run(request_of(args)))
    except (Stopped, KeyboardInterrupt):
        parser.exit(130, "\nstopped; what is finished is kept. Continue with the same command.\n")
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
