"""The curves of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.calibration.saving import write_whole

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
