"""Compares quantization methods of video models: the same clips, each method on its own grid, branches of equal rank.

    python -m calibration.compare_clips video-fp --data CLIPS --evaluate OTHERS --bits w4a4 --seeds 3 --output FOLDER

A cell is one method at one bit width with one seed. Finished cells are JSON files in FOLDER/cells and are not made again: give
the same command again after Ctrl-C or a crash. At the end, FOLDER gets comparison.md and comparison.json. Learning rates are
the recipes' own; of the methods here, LSGQuant alone trains. The autoencoder stays as it is: the methods are about transformers,
and its 8 bits would hide what they differ in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from calibration.compare import REPEATED, check_numbers
from calibration.comparison.setting import finished, write_json
from qartsr_pipeline.calibration.api import quantize
from qartsr_pipeline.calibration.data.clips import clip_files
from qartsr_pipeline.calibration.data.fingerprint import data_fingerprint, hardware, versions
from qartsr_pipeline.calibration.evaluation.rows import TEMPORAL, EvaluationRow
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.recipe_files import load_recipe
from qartsr_pipeline.calibration.training.progress import Stopped
from qartsr_pipeline.cli.arguments import DEVICE_HELP, device_name
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.whole_files import write_whole

MAIN, START = "lsgquant", "lsgquant-start"
METHODS = ("minmax", "smoothquant", "quarot", "vidit_q", "svdquant_token", "quantvsr", START, MAIN)
KEEP = {"transformer.proj_out": "w8a8", "vae.*": "w16a16"}
TO_FULL_PRECISION = "psnr_y_to_full_precision"
COLUMNS = {  # metric -> heading, layout
    TO_FULL_PRECISION: ("PSNR-Y to full precision", "{:.2f}"),
    "psnr_y": ("PSNR-Y", "{:.2f}"),
    "share_of_gain": ("of full precision's gain", "{:.1%}"),
    "ssim_y": ("SSIM-Y", "{:.4f}"),
    TEMPORAL: ("temporal error", "{:.3f}"),
}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see `arguments`."""

    model: str
    data: str
    evaluate: str
    output: Path
    methods: tuple[str, ...]
    bits: tuple[str, ...]
    steps: int | None
    rank: int
    seeds: int
    device: str


@dataclass(frozen=True)
class Cell:
    """What is made and measured once."""

    method: str
    bits: str
    seed: int = 0

    @property
    def key(self) -> str:
        return f"{self.method}-{self.bits}-seed{self.seed}"


def recipe_of(method: str, rank: int, steps: int | None) -> Recipe:
    """A method's recipe; branches, where it has any, have ``rank`` in every layer. ``steps``: None for the recipe's own."""
    recipe = replace(load_recipe(MAIN if method == START else method), keep=KEEP)
    if recipe.layer.branch_rank:
        recipe = replace(recipe, layer=replace(recipe.layer, branch_rank=rank, branch_budget=0.0))
    if method == START:
        return replace(recipe, steps=0)
    return recipe if steps is None or not recipe.stages else replace(recipe, steps=steps)


def run(request: Request) -> str:
    """Makes the cells that are missing, then the table; returns its text."""
    folders = {"calibration": request.data, "evaluation": request.evaluate}
    files = {name: list(chain.from_iterable(clip_files(folder).values())) for name, folder in folders.items()}
    data = {name: data_fingerprint(paths) for name, paths in files.items()}
    for bits in request.bits:
        first = {cell: run_cell(request, cell, data) for cell in (Cell(method, bits) for method in request.methods)}
        rivals = [cell for cell in first if cell.method != START]
        best = sorted(rivals, key=lambda cell: -first[cell]["metrics"][TO_FULL_PRECISION])[:REPEATED]
        for cell in best:
            for seed in range(1, request.seeds):
                run_cell(request, replace(cell, seed=seed), data)
    shutil.rmtree(request.output / "runs", ignore_errors=True)
    return write_table(request.output)


def run_cell(request: Request, cell: Cell, data: dict[str, Any]) -> dict[str, Any]:
    """Quantizes and measures, or reads the cell if it is finished.

    Args:
        data: fingerprints of the clips, which finished cells must have been made from.

    Raises:
        ValueError: there is a file of it with other settings, or a damaged one. Stopped: by Ctrl-C; what is done is saved.
    """
    path, folder = request.output / "cells" / f"{cell.key}.json", request.output / "runs" / cell.key
    recipe = recipe_of(cell.method, request.rank, request.steps)
    settings = {"model": request.model, "recipe": recipe.to_dict(), "bits": cell.bits, "seed": cell.seed, **data}
    settings = json.loads(json.dumps(settings))
    if finished(path, settings):
        return _read(path)
    print(f"{cell.key} ..", flush=True)
    result = quantize(
        request.model,
        cell.bits,
        request.data,
        recipe=recipe,
        seed=cell.seed,
        evaluation_data=request.evaluate,
        output=folder,
        device=request.device,
    )
    if not result.finished or result.pipeline is None:
        raise Stopped(f"stopped in {cell.key}; the same command continues it")
    full, quantized = result.rows[-2:]
    account = family_of(result.pipeline).account(result.pipeline)
    content = {
        "method": cell.method,
        "label": f"{recipe.method}, no training" if cell.method == START else recipe.method,
        "bits": cell.bits,
        "seed": cell.seed,
        "settings": settings,
        "clips": quantized.images,
        "metrics": _plain(quantized),
        "full_precision": _plain(full),
        "bicubic": _plain(result.rows[0]),
        "accounting": account.to_dict(),
        "environment": {"versions": versions(), "hardware": hardware(request.device)},
    }
    write_json(path, content)
    shutil.rmtree(folder)
    print(f"{cell.key}: {content['metrics'][TO_FULL_PRECISION]:.2f} dB to full precision", flush=True)
    return content


def _plain(row: EvaluationRow) -> dict[str, float]:
    return {name: round(value, 5) for name, value in row.numbers().items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["settings"], content["metrics"][TO_FULL_PRECISION], content["accounting"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as a cell ({type(error).__name__}): remove it to make it again") from error
    return content


def write_table(folder: Path) -> str:
    """Writes comparison.md and comparison.json from the finished cells; returns the Markdown.

    Raises:
        ValueError: nothing is finished, or a file is damaged.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = _read(path)
        groups.setdefault((cell["bits"], cell["method"]), []).append(cell)
    if not groups:
        raise ValueError(f"{folder / 'cells'} has no finished cells")
    first = next(iter(groups.values()))[0]
    parts = [_heading(first)]
    ranking: dict[str, list[dict[str, Any]]] = {}
    for bits in dict.fromkeys(bits for bits, _ in groups):
        ranked = sorted(
            (found for (width, _), found in groups.items() if width == bits), key=lambda found: -_mean(found, TO_FULL_PRECISION)
        )
        parts += [f"## {bits.upper()}", _table(ranked)]
        ranking[bits] = [
            {
                "method": found[0]["method"],
                "label": found[0]["label"],
                "seeds": [cell["seed"] for cell in found],
                "mean": {name: round(_mean(found, name), 5) for name in found[0]["metrics"]},
                "spread": {name: round(_spread(found, name), 5) for name in found[0]["metrics"]} if len(found) > 1 else None,
                "accounting": found[0]["accounting"],
                "settings": found[0]["settings"],
            }
            for found in ranked
        ]
    text = "\n\n".join(parts) + "\n"
    content = {name: first[name] for name in ("clips", "full_precision", "bicubic", "environment")} | {"ranking": ranking}
    write_json(folder / "comparison.json", content)
    write_whole(folder / "comparison.md", text.encode())
    return text


def _heading(cell: dict[str, Any]) -> str:
    full, bicubic, environment = cell["full_precision"], cell["bicubic"], cell["environment"]
    return (
        "# Quantization methods of video models compared\n\n"
        f"{cell['clips']} clips, enlarged 4 times after bicubic reduction; calibrated on others. Full precision: PSNR-Y"
        f" {full['psnr_y']:.2f}, temporal error {full[TEMPORAL]:.3f}; bicubic {bicubic['psnr_y']:.2f} and"
        f" {bicubic[TEMPORAL]:.3f}. PSNR in dB; ± is the standard deviation over seeds, whose number is in brackets. The"
        " autoencoder is not quantized. Bits a weight are those of the folder's weight files, the autoencoder's included;"
        " branches: their multiplications, as a share of the quantized layers'.\n"
        f"{environment['hardware']}; {', '.join(f'{name} {version}' for name, version in environment['versions'].items())}."
    )


def _table(ranked: Sequence[list[dict[str, Any]]]) -> str:
    columns = {name: column for name, column in COLUMNS.items() if all(name in found[0]["metrics"] for found in ranked)}
    header = ["method", *(heading for heading, _ in columns.values()), "bits a weight", "branches", "steps"]
    lines = ["| " + " | ".join(header) + " |", "| :-- |" + " --: |" * (len(header) - 1)]
    for found in ranked:
        values = [_shown(found, name, layout) for name, (_, layout) in columns.items()]
        account, steps = found[0]["accounting"], found[0]["settings"]["recipe"]["steps"]
        further = [f"{account['bits_a_weight']:.2f}", f"{account['branch_cost']:.1%}", str(steps)]
        lines.append("| " + " | ".join([found[0]["label"], *values, *further]) + " |")
    return "\n".join(lines)


def _mean(cells: Sequence[dict[str, Any]], metric: str) -> float:
    return statistics.fmean(cell["metrics"][metric] for cell in cells)


def _spread(cells: Sequence[dict[str, Any]], metric: str) -> float:
    return statistics.stdev(cell["metrics"][metric] for cell in cells)


def _shown(cells: Sequence[dict[str, Any]], metric: str, layout: str) -> str:
    mean = layout.format(_mean(cells, metric))
    return mean if len(cells) == 1 else f"{mean} ± {layout.format(_spread(cells, metric))} ({len(cells)})"


def arguments() -> argparse.ArgumentParser:
    description = "Compares quantization methods of video models: the same clips, each on its own grid, branches of equal rank."
    parser = argparse.ArgumentParser(prog="python -m calibration.compare_clips", description=description)
    parser.add_argument("model", nargs="?", default="video-fp", help="full-precision video model: folder, shipped name or Hub id")
    parser.add_argument("--data", required=True, help="folder of clips to calibrate on")
    parser.add_argument("--evaluate", required=True, help="folder of other clips to measure on")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--bits", nargs="+", default=["w4a4"], metavar="BITS", type=str.lower, help="default: w4a4")
    parser.add_argument("--steps", type=int, help="optimizer steps of a method that trains (default: as its recipe says)")
    parser.add_argument("--rank", type=int, default=32, help="of every branch (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help=f"of the best {REPEATED} methods at each bit width (default: 1)")
    parser.add_argument("--output", type=Path, required=True, help="folder of cells and table")
    parser.add_argument("--device", type=device_name, default="auto", help=DEVICE_HELP)
    return parser


def request_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Request:
    """The arguments, checked."""
    check_numbers(parser, args, "steps", "seeds", "rank")
    return Request(
        model=args.model,
        data=args.data,
        evaluate=args.evaluate,
        output=args.output,
        methods=tuple(args.methods),
        bits=tuple(args.bits),
        steps=args.steps,
        rank=args.rank,
        seeds=args.seeds,
        device=choose_device(args.device)[0],
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command; exits with 2 and one line for errors, with 130 when interrupted."""
    parser = arguments()
    request = request_of(parser, parser.parse_args(argv))
    try:
        print(run(request))
    except (Stopped, KeyboardInterrupt):
        parser.exit(130, "\nstopped; what is finished is kept. Continue with the same command.\n")
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
