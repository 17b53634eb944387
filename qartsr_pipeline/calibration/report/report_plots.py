"""The plots of a calibration report, each as the bytes of a PNG. matplotlib is needed; no display is."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qartsr_pipeline.calibration.training.progress import Histogram, LayerSensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # told apart by the colour-blind too
COLUMNS = 4
MOST_STAGES, MOST_LAYERS, MOST_BOUNDS = 24, 40, 24
SINGLE_LINE = 0.26  # inches a line of a plot with one line a layer


def png_of(figure: Figure) -> bytes:
    """The bytes of a PNG, on white; without pyplot no display is needed, and no state is kept."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110, facecolor="white")
    return content.getvalue()


def plot_losses(losses: dict[str, list[float]]) -> bytes:
    """The loss of every step, and its running mean, a panel a stage; the last `MOST_STAGES` stages.

    Args:
        losses: stage -> loss of each step. What is not a number above zero leaves a gap.
    """
    shown = list(losses.items())[-MOST_STAGES:]
    figure, panels = _panels(len(shown), height=2.4)
    for axes, (stage, values) in zip(panels, shown, strict=True):
        steps, loss = np.arange(1, len(values) + 1), _positive(values)
        axes.plot(steps, loss, color=BLUE, alpha=0.35, linewidth=0.8, marker="." if len(values) == 1 else None)
        axes.plot(steps, running_mean(loss), color=BLUE, linewidth=1.6)
        _log_if_possible(axes, "y", loss)
        _title(axes, stage)
        axes.set_xlabel("step")
    return png_of(figure)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the last twentieth of the steps up to each one, gaps left out; NaN where all are gaps."""
    window = max(1, len(values) // 20)
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known)
    sums[window:], counts[window:] = sums[window:] - sums[:-window], counts[window:] - counts[:-window]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def plot_module_losses(modules: list[tuple[str, float, float]]) -> bytes:
    """Loss of each module before and after its training, from top to bottom as they were trained."""
    figure, axes = _lines([name for name, _, _ in modules])
    before, after = _positive([row[1] for row in modules]), _positive([row[2] for row in modules])
    positions = np.arange(len(modules))
    axes.hlines(positions, before, after, color=GREY, linewidth=1.2, zorder=1)
    axes.scatter(before, positions, color=ORANGE, s=22, label="before", zorder=2)
    axes.scatter(after, positions, color=BLUE, s=22, label="after", zorder=2)
    _log_if_possible(axes, "x", np.concatenate([before, after]))
    axes.set_xlabel("loss of the module")
    _legend_above(figure)
    return png_of(figure)


def plot_layer_errors(errors: dict[str, float]) -> bytes:
    """Relative squared error of the worst `MOST_LAYERS` layers, the worst at the top."""
    shown = worst_layers(errors, MOST_LAYERS)
    figure, axes = _lines(shown)
    values = _positive([errors[name] for name in shown])
    axes.scatter(values, np.arange(len(shown)), color=BLUE, s=22)
    _log_if_possible(axes, "x", values)
    axes.set_xlabel("relative squared error of the layer's output")
    return png_of(figure)


def worst_layers(errors: dict[str, float], count: int) -> list[str]:
    """Names by falling error, those with an error that is no number first."""
    return sorted(errors, key=lambda name: -errors[name] if math.isfinite(errors[name]) else -math.inf)[:count]


def plot_sensitivities(sensitivities: Mapping[str, LayerSensitivity]) -> bytes:
    """How much the inputs of the most sensitive `MOST_LAYERS` layers vary from clip to clip, the most sensitive at the top."""
    shown = worst_layers({name: row["value"] for name, row in sensitivities.items()}, MOST_LAYERS)
    figure, axes = _lines(shown)
    for kind, colour in (("high", ORANGE), ("medium", BLUE), ("low", GREY)):
        places = [place for place, name in enumerate(shown) if sensitivities[name]["kind"] == kind]
        if places:
            axes.scatter(
                _positive([sensitivities[shown[place]]["value"] for place in places]), places, color=colour, s=22, label=kind
            )
    _log_if_possible(axes, "x", _positive([sensitivities[name]["value"] for name in shown]))
    axes.set_xlabel("sensitivity: variance of the mean input over clips")
    _legend_above(figure)
    return png_of(figure)


def plot_curve(curve: list[tuple[float, float]]) -> bytes:
    """Predicted error of the image over bits a weight; the last point is the assignment that was chosen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    bits, errors = np.array([point[0] for point in curve]), _positive([point[1] for point in curve])
    axes.plot(bits, errors, color=BLUE, linewidth=1.4, marker="." if len(curve) < 40 else None)
    axes.plot(bits[-1:], errors[-1:], color=ORANGE, marker="o")
    _log_if_possible(axes, "y", errors)
    axes.set_xlabel("bits a weight")
    axes.set_ylabel("predicted squared error")
    axes.tick_params(which="both", labelsize=8)
    return png_of(figure)


def plot_bounds(bounds: Mapping[str, Histogram], errors: dict[str, float]) -> bytes:
    """Histograms of layer inputs with the learned bounds, for the `MOST_BOUNDS` layers with the largest error.

    Args:
        bounds: layer -> "counts" (n), "edges" (n + 1), "lower", "upper".
        errors: as for `plot_layer_errors`; layers that it lacks come last.

    Raises:
        ValueError: a histogram with another number of edges.
    """
    shown = worst_layers({name: errors.get(name, -1.0) for name in bounds}, MOST_BOUNDS)
    figure, panels = _panels(len(shown), height=1.9)
    for axes, name in zip(panels, shown, strict=True):
        counts, edges = (np.asarray(bounds[name][key], dtype=np.float64) for key in ("counts", "edges"))
        if len(edges) != len(counts) + 1:
            raise ValueError(f"layer {name}: a histogram of {len(counts)} counts has {len(counts) + 1} edges, got {len(edges)}")
        axes.stairs(counts, edges, fill=True, color=BLUE, alpha=0.6)
        for key in ("lower", "upper"):
            if math.isfinite(bounds[name][key]):
                axes.axvline(bounds[name][key], color=ORANGE, linewidth=1.4)
        axes.set_yscale("symlog", linthresh=1)  # few values lie far out, and they are what bounds are about
        axes.set_ylim(0)
        axes.set_yticks([])
        _title(axes, name)
    return png_of(figure)


def plot_sweep(sweep: list[dict[str, Any]]) -> bytes:
    """Every quantity of a timestep sweep over the timestep, a panel each.

    Args:
        sweep: rows with "timestep" and numbers; one that is marked by a true value of "chosen" gets a line.
    """
    rows = sorted(sweep, key=lambda row: row["timestep"])
    timesteps = [row["timestep"] for row in rows]
    quantities = sweep_quantities(rows)
    figure, panels = _panels(len(quantities), height=2.6, columns=3)
    for axes, quantity in zip(panels, quantities, strict=True):
        values = np.array([np.nan if row.get(quantity) is None else row[quantity] for row in rows], dtype=np.float64)
        axes.plot(timesteps, values, color=BLUE, marker="o", markersize=4)
        for row in rows:
            if row.get("chosen") is True:
                axes.axvline(row["timestep"], color=ORANGE, linestyle="--", linewidth=1.2)
        positive = values[np.isfinite(values)]
        if len(positive) and positive.min() > 0 and positive.max() > 20 * positive.min():
            axes.set_yscale("log")
        _title(axes, quantity.replace("_", " "))
        axes.set_xlabel("timestep")
    return png_of(figure)


def sweep_quantities(sweep: list[dict[str, Any]]) -> list[str]:
    """Keys, other than the timestep, under which some row has a number."""
    keys = dict.fromkeys(key for row in sweep for key in row if key != "timestep")
    return [key for key in keys if any(_is_number(row.get(key)) for row in sweep)]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(values: list[float]) -> np.ndarray:
    """As float64, NaN for what is not a number above zero: a logarithmic axis has no place for it."""
    array = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    return np.where(np.isfinite(array) & (array > 0), array, np.nan)


def _log_if_possible(axes: Axes, axis: str, values: np.ndarray) -> None:
    if np.isfinite(values).any():
        axes.set(**{f"{axis}scale": "log"})


def _title(axes: Axes, text: str) -> None:
    """Long names keep their end, which tells them apart."""
    axes.set_title(text if len(text) <= 38 else "…" + text[-37:], fontsize=8, parse_math=False)


def _panels(count: int, height: float, columns: int = COLUMNS) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot: no display is needed, and no state is kept

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(12 if columns > 1 else 7, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    for axes in panels[:count]:
        axes.tick_params(which="both", labelsize=7)
        axes.xaxis.label.set_size(8)
    return figure, panels[:count]


def _lines(names: list[str]) -> tuple[Figure, Axes]:
    """Axes with one line a name, the first at the top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.1 + SINGLE_LINE * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(np.arange(len(names)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="x", which="both", labelsize=8)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    return figure, axes


def _legend_above(figure: Figure) -> None:
    figure.legend(loc="outside upper right", ncols=2, fontsize=8, frameon=False)
