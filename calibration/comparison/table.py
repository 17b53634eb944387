"""Tables and sheets of images from the finished cells of a comparison. Rows are sorted by distance to full precision."""

from __future__ import annotations

import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calibration.comparison.learning_rate import SWEEP_STEPS
from calibration.comparison.methods import MAIN
from qartsr_pipeline.image.comparison_sheet import comparison_sheet
from qartsr_pipeline.whole_files import write_whole

TABLE_NAME, JSON_NAME = "comparison.md", "comparison.json"
COLOR_FIX = "wavelet"  # the pipeline's default: what the tables are about; the JSON has both
TO_FULL_PRECISION, TRUTH = "psnr_y_to_full_precision", "psnr_y"
COLUMNS = {  # metric -> heading, layout; further metrics to full precision come behind
    "psnr_y_to_full_precision": ("PSNR-Y to full precision", "{:.2f}"),
    "ssim_y_to_full_precision": ("SSIM-Y to full precision", "{:.4f}"),
    "closer_than_bicubic": ("closer than bicubic", "{:+.2f}"),
    "psnr_y": ("PSNR-Y", "{:.2f}"),
    "share_of_gain": ("of full precision's gain", "{:.0%}"),
    "ssim_y": ("SSIM-Y", "{:.4f}"),
}
NOT_SHOWN = {"seconds", "gain", "bicubic_to_full_precision"}


@dataclass
class Entry:
    """A method at one bit width on one model, over its seeds.

    Attributes:
        values: metric -> one value a seed.
        cells: what is in the files.
    """

    method: str
    label: str
    kind: str
    bits: str
    model: str
    values: dict[str, list[float]]
    cells: list[dict[str, Any]]

    @property
    def bits_a_weight(self) -> float:
        """See `stored_size`."""
        return self.cells[0]["bits_a_weight"]

    def mean(self, metric: str) -> float:
        return statistics.fmean(self.values[metric])

    def spread(self, metric: str) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        values = self.values[metric]
        return statistics.stdev(values) if len(values) > 1 else None


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """All finished cells.

    Raises:
        ValueError: one is damaged; the message names the file.
    """
    cells = []
    for path in sorted((folder / "cells").glob("*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
            cell["key"] = path.stem
            cell["metrics"][COLOR_FIX][TO_FULL_PRECISION], cell["bits_a_weight"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read as a cell ({type(error).__name__}): remove it to make it again") from error
        cells.append(cell)
    return cells


def full_precision_name(model: str) -> str:
    """Name of the file with the metrics of full precision; ``model`` is "" or "t999"."""
    return "-".join(filter(None, ("full-precision", model))) + ".json"


def read_full_precision(folder: Path) -> dict[str, dict[str, Any]]:
    """Model -> metrics of full precision and of bicubic."""
    names = ("", "t999")
    paths = {name: folder / full_precision_name(name) for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.is_file()}


def entries_of(cells: list[dict[str, Any]], full: dict[str, dict[str, Any]]) -> list[Entry]:
    """Cells, gathered over seeds; "share_of_gain" is that of full precision's gain over bicubic on the same model."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["bits"], cell["model"]), []).append(cell)
    entries = []
    for (method, bits, model), found in groups.items():
        found.sort(key=lambda cell: cell["seed"])
        means = [{k: v for k, v in cell["metrics"][COLOR_FIX].items() if isinstance(v, (int, float))} for cell in found]
        for values in means:
            gain = full[model]["metrics"][COLOR_FIX][TRUTH] - full[model]["bicubic"][TRUTH]
            values["share_of_gain"] = (values[TRUTH] - full[model]["bicubic"][TRUTH]) / gain
        by_metric = {metric: [each[metric] for each in means] for metric in means[0] if all(metric in each for each in means)}
        entries.append(Entry(method, found[0]["label"], found[0]["kind"], bits, model, by_metric, found))
    return entries


def by_bits(entries: list[Entry]) -> list[str]:
    """Bit widths, the most bits first."""
    return sorted({entry.bits for entry in entries}, key=lambda bits: [-int(part) for part in bits[1:].split("a")])


def ranked(entries: list[Entry], metric: str = TO_FULL_PRECISION) -> list[Entry]:
    """The best first."""
    return sorted(entries, key=lambda entry: -entry.mean(metric))


def table(entries: list[Entry]) -> str:
    """Markdown: a line for each entry, ranked by distance to full precision, with the rank by ground truth."""
    truth = {id(entry): rank for rank, entry in enumerate(ranked(entries, TRUTH), 1)}
    shared = [metric for metric in entries[0].values if all(metric in entry.values for entry in entries)]
    further = [metric for metric in shared if metric not in COLUMNS and metric not in NOT_SHOWN]
    columns = {metric: column for metric, column in COLUMNS.items() if metric in shared}
    columns |= {metric: (metric.replace("_", " "), "{:.4f}") for metric in further}
    header = [
        "#",
        "method",
        *(heading for heading, _ in columns.values()),
        "# by truth",
        "branches",
        "at other bits",
        "bits a weight",
        "MB",
        "learning rate",
        "s",
    ]
    lines = [header, ["--:", ":--", *["--:"] * (len(header) - 2)]]
    for rank, entry in enumerate(ranked(entries), 1):
        first = entry.cells[0]
        factor = first["learning_rate"]["factor"]
        values = [_with_spread(entry, metric, layout) for metric, (_, layout) in columns.items()]
        seconds = f"{statistics.fmean(cell['seconds'] for cell in entry.cells):.0f}"
        rate = (
            "" if factor is None else f"x{factor:g}" + ("" if first["learning_rate"].get("bracketed", True) else " (at the end)")
        )
        size = [_share(first, "branch_cost"), _share(first, "wider")]
        size += [f"{entry.bits_a_weight:.1f}", f"{first['megabytes']:.2f}"]
        lines.append([str(rank), entry.label, *values, str(truth[id(entry)]), *size, rate, seconds])
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _share(cell: dict[str, Any], name: str) -> str:
    """Cells of older versions have none."""
    return f"{cell[name]:.1%}" if name in cell else ""


def _with_spread(entry: Entry, metric: str, layout: str) -> str:
    spread = entry.spread(metric)
    mean = layout.format(entry.mean(metric))
    return mean if spread is None else f"{mean} ± {layout.replace('+', '').format(spread)} ({len(entry.values[metric])})"


def first_places(entries: list[Entry]) -> str:
    """One line: the best method by each of the two distances, and its lead."""
    places = []
    for metric, where in ((TO_FULL_PRECISION, "closest to full precision"), (TRUTH, "closest to the originals")):
        order = ranked(entries, metric)
        lead = f", {order[0].mean(metric) - order[1].mean(metric):.2f} dB before {order[1].label}" if len(order) > 1 else ""
        first = order[0]
        places.append(
            f"{where}: **{first.label}** ({first.mean(metric):.2f} dB at {first.bits_a_weight:.1f} bits a weight{lead})"
        )
    text = "; ".join(places)
    return text[0].upper() + text[1:] + "."


def sections(entries: list[Entry], full: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown of all tables."""
    parts = []
    for bits in by_bits(entries):
        here = [entry for entry in entries if entry.bits == bits]
        methods = [entry for entry in here if entry.kind == "method" and not entry.model]
        main = [entry for entry in methods if entry.method == MAIN]
        before = [entry for entry in here if entry.model]
        parts.append(f"## {bits.upper()}")
        if methods:
            parts += [first_places(methods), table(methods)]
        ablations = [entry for entry in here if entry.kind == "ablation"] + [_no_trq(e) for e in before if e.method == MAIN]
        if ablations:
            parts += [f"### {main[0].label if main else 'The method'} without its parts, {bits.upper()}", table(main + ablations)]
        if before:
            timestep = full["t999"]["timestep"]
            reference = full["t999"]["metrics"][COLOR_FIX][TRUTH]
            parts += [
                f"### On the model before TRQ (T = {timestep}, full precision {reference:.2f} dB), {bits.upper()}",
                table(before),
            ]
    return parts


def _no_trq(entry: Entry) -> Entry:
    """The main method on the model before TRQ, as the ablation that it is."""
    return Entry(entry.method, "no TRQ", "ablation", entry.bits, entry.model, entry.values, entry.cells)


def heading(cells: list[dict[str, Any]], full: dict[str, dict[str, Any]]) -> str:
    """What the numbers are from."""
    settings, model, first = cells[0]["settings"], full[""], cells[0]
    steps = sorted({cell["settings"]["recipe"]["steps"] for cell in cells if cell["settings"]["recipe"]["steps"]})
    metrics, bicubic = model["metrics"][COLOR_FIX], model["bicubic"]
    hardware = sorted({cell["environment"]["hardware"] for cell in cells})
    return "\n".join(
        [
            "# Quantization methods compared",
            "",
            f"{settings['evaluation']['count']} photographs, enlarged 4 times after bicubic reduction; calibrated on"
            f" others, {', '.join(map(str, steps)) or 'no'} steps where a method trains; its learning rate chosen on patches of"
            f" some that are not calibrated on ({settings['calibration']['count']} in all), in trials of a third of the steps,"
            f" {SWEEP_STEPS} at most.",
            f"Full precision (T = {model['timestep']}): PSNR-Y {metrics[TRUTH]:.2f}, SSIM-Y {metrics['ssim_y']:.4f};"
            f" bicubic {bicubic[TRUTH]:.2f} and {bicubic['ssim_y']:.4f}. Colours aligned ({COLOR_FIX}), the pipeline's default.",
            "PSNR in dB; ± is the standard deviation over seeds, whose number is in brackets. Bits a weight, MB: all that is"
            " stored of the quantized layers (codes, scales, zero points, smoothing, branches, biases); of grids that exist in"
            " simulation only, what a folder would store. Branches: their multiplications, as a share of the layers' own; at"
            " other bits: share of the layers' multiplications, the first and last ones' included."
            " s: the time of a cell, searching and measuring included.",
            f"{'; '.join(hardware)}; {', '.join(f'{k} {v}' for k, v in first['environment']['versions'].items())}.",
        ]
    )


def as_json(entries: list[Entry], full: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The tables' content, ranked, with every cell's settings but the recipes, which the cells hold."""

    def line(entry: Entry) -> dict[str, Any]:
        return {
            "method": entry.method,
            "label": entry.label,
            "kind": entry.kind,
            "model": entry.model,
            "seeds": [cell["seed"] for cell in entry.cells],
            "learning_rate_factor": entry.cells[0]["learning_rate"]["factor"],
            "megabytes": entry.cells[0]["megabytes"],
            "bits_a_weight": entry.bits_a_weight,
            "branch_cost": entry.cells[0].get("branch_cost"),
            "wider": entry.cells[0].get("wider"),
            "mean": {metric: round(entry.mean(metric), 5) for metric in entry.values},
            "spread": {m: round(s, 5) for m in entry.values if (s := entry.spread(m)) is not None},
            "mean_without_colour_alignment": _means(entry, "none"),
        }

    cut = {
        name: {k: v for k, v in content.items() if k != "metrics"} | {"metrics": _plain(content)}
        for name, content in full.items()
    }
    return {
        "full_precision": cut,
        "ranking": {bits: [line(e) for e in ranked([e for e in entries if e.bits == bits])] for bits in by_bits(entries)},
    }


def _means(entry: Entry, color_fix: str) -> dict[str, float]:
    found = [cell["metrics"].get(color_fix, {}) for cell in entry.cells]
    names = [name for name, value in found[0].items() if isinstance(value, (int, float))]
    return {name: round(statistics.fmean(each[name] for each in found), 5) for name in names if all(name in e for e in found)}


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    return {
        color_fix: {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
        for color_fix, metrics in content["metrics"].items()
    }


def picture_sheet(folder: Path, entries: list[Entry]) -> np.ndarray | None:
    """One part of one image by every method at a bit width, (H, W, 3) uint8; None if nothing was kept."""
    crops = folder / "crops"
    names = {"bicubic": "bicubic"}
    names |= {entry.label: entry.cells[0]["key"] for entry in reversed(ranked(entries))}
    names |= {"full precision": "full-precision", "original": "original"}
    found = {label: crops / f"{name}.png" for label, name in names.items()}
    pictures = {label: np.asarray(Image.open(path).convert("RGB")) for label, path in found.items() if path.is_file()}
    if len(pictures) < 2:
        return None
    side = min(next(iter(pictures.values())).shape[:2])
    third = max(1, side // 3)
    return comparison_sheet(pictures, (third, third, 2 * third, 2 * third))


def write_tables(folder: Path) -> str:
    """Writes the table as Markdown and JSON, and a sheet of images for each bit width; returns the Markdown.

    Raises:
        ValueError: nothing is finished, or a file is damaged.
    """
    cells, full = read_cells(folder), read_full_precision(folder)
    if not cells:
        raise ValueError(f"{folder / 'cells'} has no finished cells")
    for model in ["", *(cell["model"] for cell in cells)]:
        if model not in full:
            missing = folder / full_precision_name(model)
            raise ValueError(f"{missing} is missing, which the cells are compared with: run the comparison again, it makes it")
    entries = entries_of(cells, full)
    sheets = []
    for bits in by_bits(entries):
        shown = [entry for entry in entries if entry.bits == bits and entry.kind == "method" and not entry.model]
        sheet = picture_sheet(folder, shown)
        if sheet is not None:
            name = f"comparison-{bits}.png"
            _write_png(folder / name, sheet)
            sheets.append(f"![{bits.upper()}, the closest to full precision at the right]({name})")
    text = "\n\n".join([heading(cells, full), *sections(entries, full), *sheets]) + "\n"
    write_whole(folder / TABLE_NAME, text.encode())
    write_whole(folder / JSON_NAME, (json.dumps(as_json(entries, full), indent=1, ensure_ascii=False) + "\n").encode())
    return text


def _write_png(path: Path, pixels: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG", optimize=True)
    write_whole(path, content.getvalue())
