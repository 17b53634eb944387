"""What retraining shows: the curves of one training, and TRQ's measurements over the timesteps as a table and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.whole_files import write_whole

QUALITY = {"full_precision": "full precision", "quantized": "plainly quantized", "bypass": "UNet bypassed"}
ERRORS = {"amplification": "amplification", "z_error": "relative error of z_H", "eps_error": "relative error of eps"}
CURVES = {
    "model": "model",
    "model_real": "model, real degradation",
    "bypass": "UNet bypassed",
    "autoencoder": "autoencoder on the original",
    "bicubic": "bicubic",
}
LPIPS_CURVES = {
    "lpips": "model",
    "lpips_real": "model, real degradation",
    "lpips_bicubic": "bicubic",
    "lpips_bicubic_real": "bicubic, real degradation",
}


def plot_if_possible(history: list[dict[str, Any]], path: Path) -> bool:
    """`plot_training`, where there is something to draw and matplotlib is installed; returns whether a file was written."""
    if not history:
        return False
    try:
        plot_training(history, path)
    except ImportError:
        return False
    return True


def plot_training(history: list[dict[str, Any]], path: Path) -> None:
    """Draws PSNR-Y and loss over all phases' steps into a PNG, and LPIPS where it was measured.

    Args:
        history: the rows of history.json: phase, step within the phase, loss, PSNR-Y in dB under the keys of `CURVES`, LPIPS
            under those of `LPIPS_CURVES`, and single terms of the loss under names that begin with "loss_".

    Raises:
        ImportError: matplotlib is not installed. SavingError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is needed, and no state is kept

    steps, borders = running_steps(history)
    measured = any(key in row for row in history for key in LPIPS_CURVES)
    figure = Figure(figsize=(9, 12 if measured else 8), layout="constrained")
    quality, *perceptual, loss = figure.subplots(3 if measured else 2, 1, sharex=True)
    _draw(quality, CURVES, steps, history)
    for axes in perceptual:
        _draw(axes, LPIPS_CURVES, steps, history)
        axes.set(ylabel="LPIPS (Alex) of held-out patches")
    terms = sorted({key for row in history for key in row if key.startswith("loss_")})
    _draw(loss, {key: key.removeprefix("loss_") for key in terms}, steps, history)
    start = 0
    for name, end in borders:  # losses of different phases cannot be compared: one colour each
        chosen = [index for index, step in enumerate(steps) if start < step <= end]
        loss.plot([steps[i] for i in chosen], [history[i]["loss"] for i in chosen], label=name)
        start = end
    for axes in (quality, *perceptual, loss):
        for _, end in borders[:-1]:
            axes.axvline(end, color="0.8", zorder=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    quality.set(ylabel="PSNR-Y of held-out patches, dB")
    loss.set(ylabel="training loss", xlabel="steps", yscale="log")
    write_whole(path, png_of(figure))


def _draw(axes: Any, curves: dict[str, str], steps: list[int], history: list[dict[str, Any]]) -> None:
    """The rows' values under the keys of ``curves``, labelled with its values; bicubic ones dashed."""
    for key, label in curves.items():
        points = [(step, row[key]) for step, row in zip(steps, history, strict=True) if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linestyle="--" if "bicubic" in key else "-")


def running_steps(history: list[dict[str, Any]]) -> tuple[list[int], list[tuple[str, int]]]:
    """Each row's step counted through all phases, and the phases with the count at their end.

    A new phase begins where the name changes, or where the step is not larger than the one before.
    """
    steps: list[int] = []
    borders: list[tuple[str, int]] = []
    previous: dict[str, Any] | None = None
    offset = 0
    for row in history:
        if previous is None or row["phase"] != previous["phase"] or row["step"] <= previous["step"]:
            offset = steps[-1] if steps else 0
            borders.append((row["phase"], offset))
        steps.append(offset + row["step"])
        borders[-1] = (row["phase"], steps[-1])
        previous = row
    return steps, borders


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
