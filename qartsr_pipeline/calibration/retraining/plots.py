"""The curves of a training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.report.figures import png_of
from qartsr_pipeline.calibration.training.training_state import write_whole

CURVES = {"model": "model", "bypass": "UNet bypassed", "autoencoder": "autoencoder on the original", "bicubic": "bicubic"}


def plot_training(history: list[dict[str, Any]], path: Path) -> None:
    """Draws PSNR-Y and loss over all phases' steps into a PNG.

    Args:
        history: the rows of history.json: phase, step within the phase, loss, and PSNR-Y in dB under the keys of `CURVES`.

    Raises:
        ImportError: no matplotlib. SavingError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no display is needed, and no state is kept

    steps, borders = running_steps(history)
    figure = Figure(figsize=(9, 8), layout="constrained")
    quality, loss = figure.subplots(2, 1, sharex=True)
    for key, label in CURVES.items():
        points = [(step, row[key]) for step, row in zip(steps, history, strict=True) if key in row]
        if points:
            quality.plot(*zip(*points, strict=True), label=label, linestyle="--" if key == "bicubic" else "-")
    start = 0
    for name, end in borders:  # losses of different phases cannot be compared: one colour each
        chosen = [index for index, step in enumerate(steps) if start < step <= end]
        loss.plot([steps[i] for i in chosen], [history[i]["loss"] for i in chosen], label=name)
        start = end
    for axes in (quality, loss):
        for _, end in borders[:-1]:
            axes.axvline(end, color="0.8", zorder=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    quality.set(ylabel="PSNR-Y of held-out patches, dB")
    loss.set(ylabel="training loss", xlabel="steps", yscale="log")
    write_whole(path, png_of(figure))


def plot_sweep(rows: list[dict[str, Any]], chosen: int | None, path: Path) -> None:
    """Draws what TRQ measured over the timesteps into a PNG.

    Args:
        rows: the rows of sweep.json; see `trq.Candidate`.
        chosen: the timestep that is marked.

    Raises:
        ImportError: no matplotlib. SavingError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: row["timestep"])
    timesteps = [row["timestep"] for row in rows]
    figure = Figure(figsize=(9, 8), layout="constrained")
    quality, error = figure.subplots(2, 1, sharex=True)
    for key, label in (("full_precision", "full precision"), ("quantized", "plainly quantized"), ("bypass", "UNet bypassed")):
        quality.plot(timesteps, [row[key] for row in rows], marker="o", label=label)
    quality.axhline(rows[0]["bicubic"], linestyle="--", color="0.5", label="bicubic")
    curves = (("amplification", "amplification"), ("z_error", "relative error of z_H"), ("eps_error", "relative error of eps"))
    for key, label in curves:
        error.plot(timesteps, [row[key] for row in rows], marker="o", label=label)
    for axes in (quality, error):
        if chosen is not None:
            axes.axvline(chosen, color="0.7", zorder=0, label="chosen")
        axes.legend()
    quality.set(ylabel="PSNR-Y of held-out pictures, dB")
    error.set(xlabel="timestep T", yscale="log")
    write_whole(path, png_of(figure))


def running_steps(history: list[dict[str, Any]]) -> tuple[list[int], list[tuple[str, int]]]:
    """Each row's step counted through all phases, and the phases with the count at their end.

    A row that belongs to a new phase: its name changes, or its step is not larger than the one before.
    """
    steps: list[int] = []
    borders: list[tuple[str, int]] = []
    for previous, row in zip([None, *history], history, strict=False):
        if previous is None or row["phase"] != previous["phase"] or row["step"] <= previous["step"]:
            offset = steps[-1] if steps else 0
            borders.append((row["phase"], offset))
        steps.append(offset + row["step"])
        borders[-1] = (row["phase"], steps[-1])
    return steps, borders


def plot_if_possible(history: list[dict[str, Any]], path: Path) -> bool:
    """`plot_training`, where there is something to draw and matplotlib is installed; returns whether a file was written."""
    if not history:
        return False
    try:
        plot_training(history, path)
    except ImportError:
        return False
    return True


def main(argv: list[str] | None = None) -> None:
    """`python calibration/training_plots.py runs/teacher/history.json` draws training.png beside it."""
    paths = [Path(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if not paths:
        sys.exit("usage: training_plots.py HISTORY.json ..")
    for path in paths:
        try:
            plot_training(json.loads(path.read_text(encoding="utf-8")), path.with_name("training.png"))
        except (OSError, ValueError, KeyError, ImportError) as error:
            sys.exit(f"training_plots.py: error: {path}: {error}")
        print(f"written: {path.with_name('training.png')}")


if __name__ == "__main__":
    main()
