"""TRQ's measurements over the timesteps as a table and a plot, made from the content of sweep.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.calibration.saving import write_whole

QUALITY = {"full_precision": "full precision", "quantized": "plainly quantized", "bypass": "UNet bypassed"}
ERRORS = {"amplification": "amplification", "z_error": "relative error of z_H", "eps_error": "relative error of eps"}


def write_sweep(sweep: dict[str, Any], folder: Path) -> None:
    """Writes sweep.json, sweep.md and, where matplotlib is installed, sweep.png.

    Args:
        sweep: what `TRQ.sweep` measured: "rows" of `trq.Candidate`, the "chosen" timestep or None, the "options".

    Raises:
        SavingError: a file cannot be written.
    """
    write_whole(folder / "sweep.json", (json.dumps(sweep, indent=1) + "\n").encode())
    write_whole(folder / "sweep.md", sweep_table(sweep).encode())
    try:
        plot_sweep(sweep["rows"], sweep["chosen"], folder / "sweep.png")
    except ImportError:
        pass  # matplotlib is optional; the table says the same


def sweep_table(sweep: dict[str, Any]) -> str:
    """The table in Markdown, with the rule below it."""
    rows, options = sweep["rows"], sweep["options"]
    bits = "W{}A{}".format(*options["bits"])
    lines = [
        "| T | amplification | full precision, dB | UNet bypassed, dB | bypass costs, dB |"
        f" eps error, {bits} | z_H error, {bits} | {bits}, dB | {bits} to full precision, dB | chosen |",
        "| --: " * 9 + "| :-: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['timestep']} | {row['amplification']:.3f} | {row['full_precision']:.2f} | {row['bypass']:.2f}"
            f" | {row['bypass_cost']:.2f} | {row['eps_error']:.3f} | {row['z_error']:.3f} | {row['quantized']:.2f}"
            f" | {row['quantized_to_full_precision']:.2f} | {'yes' if row['timestep'] == sweep['chosen'] else ''} |"
        )
    steps = " + ".join(f"{phase['steps']} {phase['name']}" for phase in options["phases"])
    lines += [
        "",
        f"PSNR-Y of held-out images after {steps} steps at each timestep; bicubic {rows[0]['bicubic']:.2f} dB. {bits}: the UNet"
        " quantized plainly (minimum and maximum, nothing trained).",
        "",
        f"Rule: bypassing the UNet costs at least {options['rule']['least_bypass_cost']:g} dB; full precision within"
        f" {options['rule']['quality_margin']:g} dB of the best of these; then the least error of z_H.",
        "" if sweep["chosen"] is not None else "\nNo candidate passes it.\n",
    ]
    return "\n".join(lines)


def plot_sweep(rows: list[dict[str, Any]], chosen: int | None, path: Path) -> None:
    """Draws quality and errors over the timesteps into a PNG.

    Args:
        rows: the rows of sweep.json; see `trq.Candidate`.
        chosen: the timestep that is marked.

    Raises:
        ImportError: matplotlib is not installed. SavingError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is needed, and no state is kept

    rows = sorted(rows, key=lambda row: row["timestep"])
    timesteps = [row["timestep"] for row in rows]
    figure = Figure(figsize=(9, 8), layout="constrained")
    quality, error = figure.subplots(2, 1, sharex=True)
    for axes, curves in ((quality, QUALITY), (error, ERRORS)):
        for key, label in curves.items():
            axes.plot(timesteps, [row[key] for row in rows], marker="o", label=label)
    quality.axhline(rows[0]["bicubic"], linestyle="--", color="0.5", label="bicubic")
    for axes in (quality, error):
        if chosen is not None:
            axes.axvline(chosen, color="0.7", zorder=0, label="chosen")
        axes.legend()
    quality.set(ylabel="PSNR-Y of held-out images, dB")
    error.set(xlabel="timestep T", yscale="log")
    write_whole(path, png_of(figure))
