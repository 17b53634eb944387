"""The report of a calibration run: one HTML file that needs nothing else, and its plots and images as PNG files beside it."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow, table
from qartsr_pipeline.calibration.report import report_plots as plots
from qartsr_pipeline.calibration.training.progress import Histogram, LayerSensitivity
from qartsr_pipeline.image.comparison_page import Comparison, NamedImage, comparison_html, data_address, document
from qartsr_pipeline.image.comparison_sheet import cut_to_detail, sheet_around_detail
from qartsr_pipeline.whole_files import write_whole


@dataclass
class ReportData:
    """What a report shows. A section without data is left out.

    Attributes:
        facts: what was run: recipe, bits, data, perceptual loss, seconds, hardware, versions.
        losses: stage -> loss of each step.
        module_losses: (module, loss before, loss after its training), as they were trained.
        curve: bits a weight and predicted error of the image, from the smallest assignment of bits and ranks to the chosen one.
        layer_errors: layer -> relative squared error of its output.
        sensitivities: layer -> sensitivity, class and steps, see `training.volts`; they are also written to sensitivities.json.
        bounds: layer -> {"counts": n numbers, "edges": n + 1, "lower": .., "upper": ..}: its input's histogram and bounds.
        sweep: rows of the timestep sweep, each with "timestep" and numbers; "chosen": true marks one.
        metrics: rows of an evaluation.
        strips: film strips of clips, name -> (H, W, 3) uint8.
        pictures: for each image name -> (H, W, 3) uint8, of one size, in the order in which they are shown.
    """

    title: str
    facts: dict[str, str] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    module_losses: list[tuple[str, float, float]] = field(default_factory=list)
    curve: list[tuple[float, float]] = field(default_factory=list)
    layer_errors: dict[str, float] = field(default_factory=dict)
    sensitivities: Mapping[str, LayerSensitivity] = field(default_factory=dict)
    bounds: Mapping[str, Histogram] = field(default_factory=dict)
    sweep: list[dict[str, Any]] | None = None
    metrics: list[EvaluationRow] = field(default_factory=list)
    pictures: list[dict[str, np.ndarray]] = field(default_factory=list)
    strips: dict[str, np.ndarray] = field(default_factory=dict)


def write_report(folder: str | Path, data: ReportData) -> Path:
    """Writes ``folder``/index.html and the PNG files; returns the path of the page.

    Without matplotlib there are no plots, and the page says so. Every text is escaped: names may come from users.

    Raises:
        ValueError: data that do not fit together; the message names them.
        SavingError: a file cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(folder)
    sections = [
        _facts(data),
        _metrics(data),
        *_pictures(data, page),
        _strips(data, page),
        _losses(data, page),
        _modules(data, page),
        _curve(data, page),
        _sensitivities(data, page),
        _layers(data, page),
        _bounds(data, page),
        _sweep(data, page),
    ]
    index = folder / "index.html"
    write_whole(index, document(data.title, sections).encode())
    return index


@dataclass
class Page:
    """Puts images into the folder and, embedded, into the page."""

    folder: Path

    def plot(self, name: str, draw: Callable[[], bytes], description: str) -> str:
        """A plot as HTML, or the remark that matplotlib is missing."""
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError:
            return "<p>Plots need matplotlib: <code>pip install 'qartsr[calibration]'</code>.</p>"
        return self.image(name, draw(), description)

    def image(self, name: str, content: bytes, description: str) -> str:
        write_whole(self.folder / name, content)
        caption = f'{escape(description)} <a href="{escape(name)}">{escape(name)}</a>'
        source = data_address(content, "png")
        return f'<figure><img src="{source}" alt="{escape(description)}"><figcaption>{caption}</figcaption></figure>'


def _section(heading: str, *content: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(content) + "\n</section>"


def _table(rows: list[list[str]], header: list[str] | None = None, text: bool = False) -> str:
    """Text cells as an HTML table, in a box that scrolls where it is too wide."""
    lines = [] if header is None else ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table{" class=text" if text else ""}>' + "\n".join(lines) + "</table></div>"


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _facts(data: ReportData) -> str:
    return (
        _section("What was run", _table([[name, str(value)] for name, value in data.facts.items()], text=True))
        if data.facts
        else ""
    )


def _metrics(data: ReportData) -> str:
    if not data.metrics:
        return ""
    header, rows = table(data.metrics)
    return _section("Image quality", _table(rows, header), "<p>PSNR in dB. Means over the images.</p>")


def _pictures(data: ReportData, page: Page) -> list[str]:
    """A slider for each image; a sheet with all its versions side by side becomes a file, to be passed on."""
    figures = []
    for number, pictures in enumerate(data.pictures, 1):
        name = f"pictures-{number}.png"
        write_whole(page.folder / name, _encoded(sheet_around_detail(pictures, number)))
        versions = [NamedImage(version, pixels) for version, pixels in cut_to_detail(pictures)[0].items()]
        # First the last two before the original: full precision and the quantized model.
        left, right = (-3, -2) if len(versions) > 3 else (0, -1)
        figures.append(comparison_html(Comparison(f"Image {number}", versions, left=left, right=right)))
        figures.append(f'<p>Side by side, and a part enlarged: <a href="{name}">{name}</a></p>')
    return [_section("Images", *figures)] if figures else []


def _strips(data: ReportData, page: Page) -> str:
    images = [
        page.image(f"strip-{number}.png", _encoded(pixels), f"{name}: frames of each version, and what they differ by.")
        for number, (name, pixels) in enumerate(data.strips.items(), 1)
    ]
    return _section("Film strips", *images) if images else ""


def _encoded(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    return content.getvalue()


def _losses(data: ReportData, page: Page) -> str:
    losses = {stage: values for stage, values in data.losses.items() if values}
    if not losses:
        return ""
    description = "Loss of every step, and its running mean."
    if len(losses) > plots.MOST_STAGES:
        description += f" The last {plots.MOST_STAGES} of {len(losses)} stages."
    rows = [[stage, str(len(values)), _number(values[0]), _number(values[-1])] for stage, values in losses.items()]
    listed = _details("Stages as a table", _table(rows, ["stage", "steps", "first loss", "last loss"]))
    return _section("Losses", page.plot("losses.png", lambda: plots.plot_losses(losses), description), listed)


def _modules(data: ReportData, page: Page) -> str:
    if not data.module_losses:
        return ""
    rows = [[name, _number(before), _number(after)] for name, before, after in data.module_losses]
    plot = page.plot(
        "modules.png", lambda: plots.plot_module_losses(data.module_losses), "Loss of each module around its training."
    )
    return _section("Modules", plot, _details("Modules as a table", _table(rows, ["module", "before", "after"])))


def _curve(data: ReportData, page: Page) -> str:
    if not data.curve:
        return ""
    description = "Predicted error of the image over bits a weight, as bits and ranks were given to layers; orange: chosen."
    plot = page.plot("budget.png", lambda: plots.plot_curve(data.curve), description)
    rows = [[f"{bits:.3f}", _number(error)] for bits, error in data.curve]
    return _section("Budget", plot, _details("As a table", _table(rows, ["bits a weight", "predicted squared error"])))


def _sensitivities(data: ReportData, page: Page) -> str:
    if not data.sensitivities:
        return ""
    found = data.sensitivities
    write_whole(page.folder / "sensitivities.json", (json.dumps(found, indent=1) + "\n").encode())
    names = sorted(found, key=lambda name: -found[name]["value"])
    rows = [[name, _number(found[name]["value"]), found[name]["kind"], str(found[name]["steps"])] for name in names]
    description = f"The most sensitive {min(len(names), plots.MOST_LAYERS)} of {len(names)} layers."
    plot = page.plot("sensitivities.png", lambda: plots.plot_sensitivities(found), description)
    listed = _details("All layers as a table", _table(rows, ["layer", "sensitivity", "class", "steps"]))
    return _section("Sensitivity of each layer", plot, listed, '<p><a href="sensitivities.json">sensitivities.json</a></p>')


def _layers(data: ReportData, page: Page) -> str:
    if not data.layer_errors:
        return ""
    names = plots.worst_layers(data.layer_errors, len(data.layer_errors))
    rows = [[name, _number(data.layer_errors[name])] for name in names]
    description = f"The worst {min(len(names), plots.MOST_LAYERS)} of {len(names)} layers."
    plot = page.plot("layers.png", lambda: plots.plot_layer_errors(data.layer_errors), description)
    listed = _details("All layers as a table", _table(rows, ["layer", "relative squared error"]))
    return _section("Error of each layer", plot, listed)


def _bounds(data: ReportData, page: Page) -> str:
    if not data.bounds:
        return ""
    count = min(len(data.bounds), plots.MOST_BOUNDS)
    description = (
        f"Inputs of the worst {count} of {len(data.bounds)} layers, counts on a logarithmic axis, with their learned bounds."
    )
    plot = page.plot("bounds.png", lambda: plots.plot_bounds(data.bounds, data.layer_errors), description)
    rows = [[name, _number(entry["lower"]), _number(entry["upper"])] for name, entry in data.bounds.items()]
    return _section("Bounds", plot, _details("Bounds as a table", _table(rows, ["layer", "lower", "upper"])))


def _sweep(data: ReportData, page: Page) -> str:
    sweep = data.sweep
    if not sweep:
        return ""
    for number, row in enumerate(sweep, 1):
        if "timestep" not in row:
            raise ValueError(f"row {number} of the timestep sweep has no entry 'timestep', only {', '.join(row)}")
    keys = list(dict.fromkeys(["timestep", *(key for row in sweep for key in row)]))
    rows = [[_number(row.get(key)) for key in keys] for row in sweep]
    plot = ""
    if plots.sweep_quantities(sweep):
        plot = page.plot("timesteps.png", lambda: plots.plot_sweep(sweep), "What each timestep would give; dashed: chosen.")
    return _section("Timesteps", plot, _table(rows, [key.replace("_", " ") for key in keys]))
