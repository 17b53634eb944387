"""What the timestep is worth in the end: QArtSR at low bits on every candidate of a timestep search, equal budgets.

    python calibration/trq.py tiny-fp --data PHOTOS --sweep-only --output runs/trq
    python -m benchmarks run timesteps runs/trq --data PHOTOS --evaluate OTHERS --cells runs/timesteps --output FILE.json

Every candidate was retrained for the same steps (`calibration/trq.py`); here each is quantized with the same recipe, steps, seed
and images, its learning rate chosen on held-out patches, and measured on other photographs. The folder of --cells
gets a JSON file for every candidate and bit width, which are not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.result import Result, markdown
from calibration.comparison.cells import full_precision, run_cell
from calibration.comparison.methods import Cell, make_method
from calibration.comparison.setting import Comparison, Sources, prepare
from calibration.comparison.table import COLOR_FIX
from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.calibration.training.progress import Stopped
from qartsr_pipeline.whole_files import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("search", type=Path, help="output folder of calibration/trq.py")
    parser.add_argument("--data", required=True, help="folder of photographs to calibrate on")
    parser.add_argument("--evaluate", required=True, help="folder of other photographs to measure on")
    parser.add_argument("--steps", type=int, default=60, help="of QArtSR at each candidate and bit width (default: 60)")
    parser.add_argument("--bits", nargs="+", default=["w4a4", "w2a2"], metavar="BITS")
    parser.add_argument("--limit", type=int, help="only so many photographs of --evaluate, the first by name")
    parser.add_argument("--cells", type=Path, required=True, help="folder of the finished cells")


def read_candidates(search: Path) -> dict[str, dict[str, Any]]:
    """Folder name -> what `calibration/trq.py` measured there, by timestep.

    Raises:
        ValueError: there is no finished candidate.
    """
    found = {path.parent.name: json.loads(path.read_text())["candidate"] for path in search.glob("t*/result.json")}
    if not found:
        raise ValueError(f"{search} has no finished candidate: make some with calibration/trq.py --output {search}")
    return dict(sorted(found.items(), key=lambda item: item[1]["timestep"]))


def line_of(comparison: Comparison, name: str, searched: dict[str, Any], steps: int, widths: list[str]) -> dict[str, Any]:
    """A row of the table: one candidate."""
    full = full_precision(comparison, name)
    row = {
        "timestep": searched["timestep"],
        "amplification": searched["amplification"],
        "bypass_cost": searched["full_precision"] - searched["bypass"],
        "z_error": searched["z_error"],
        "bicubic": full["bicubic"]["psnr_y"],
        "full_precision": full["metrics"][COLOR_FIX]["psnr_y"],
    }
    for bits in widths:
        metrics = run_cell(comparison, Cell(make_method("qartsr", steps), bits, model=name))["metrics"][COLOR_FIX]
        row[bits] = {"psnr_y": metrics["psnr_y"], "to_full_precision": metrics["psnr_y_to_full_precision"]}
        print(f"T = {row['timestep']}, {bits}: {metrics['psnr_y']:.2f} dB", flush=True)
    return row


def table(result: Result) -> str:
    """Markdown, and what it is of."""
    rows, widths = result.rows, result.settings["bits"]
    shown = [f"{bits.upper()}{what}" for bits in widths for what in (", dB", " to full precision, dB")]
    head = ["T", "amplification", "bypassing the UNet costs, dB", "z_H error, plain W4A4", "full precision, dB", *shown]
    lines = []
    for row in rows:
        values = [f"{row[bits][key]:.2f}" for bits in widths for key in ("psnr_y", "to_full_precision")]
        first = [str(row["timestep"]), f"{row['amplification']:.3f}", f"{row['bypass_cost']:.2f}", f"{row['z_error']:.3f}"]
        lines.append([*first, f"{row['full_precision']:.2f}", *values])
    return f"{markdown(head, lines)}\n\nBicubic {rows[0]['bicubic']:.2f} dB. {result.summary['about']}"


def plot(result: Result, path: Path) -> None:
    """PSNR-Y against the timestep. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure, rows, widths = Figure(figsize=(8, 5), layout="constrained"), result.rows, result.settings["bits"]
    axes, timesteps = figure.subplots(), [row["timestep"] for row in rows]
    axes.plot(timesteps, [row["full_precision"] for row in rows], marker="o", label="full precision")
    for bits in widths:
        axes.plot(timesteps, [row[bits]["psnr_y"] for row in rows], marker="o", label=bits.upper())
    axes.axhline(rows[0]["bicubic"], linestyle="--", color="0.5", label="bicubic")
    axes.set(xlabel="timestep T", ylabel="PSNR-Y, dB")
    axes.legend()
    write_whole(path, png_of(figure))


def measure(args: argparse.Namespace) -> Result:
    """A row for each candidate."""
    candidates = read_candidates(args.search)
    folders = {name: str(args.search / name / "model") for name in candidates}
    comparison = prepare(Sources(folders, args.data, args.evaluate, args.cells, args.limit, device="cpu"))
    try:
        rows = [line_of(comparison, name, candidates[name], args.steps, args.bits) for name in candidates]
    except Stopped as stopped:
        raise KeyboardInterrupt from stopped
    options = json.loads((args.search / next(iter(candidates)) / "result.json").read_text())["made_with"]
    retrained = " + ".join(f"{phase['steps']} {phase['name']}" for phase in options["phases"])
    about = (
        f"Candidates retrained for {retrained} steps from {options['model']}, then QArtSR for {args.steps} steps, one seed,"
        f" learning rates chosen on held-out patches; {len(comparison.evaluation)} photographs, colours aligned ({COLOR_FIX})."
        " The first columns are of `calibration/trq.py`, on its own held-out photographs."
    )
    return Result("timesteps", {"bits": args.bits, "data": comparison.data}, rows, {"about": about})
