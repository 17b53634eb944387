"""Evaluation results as JSON and as a Markdown table."""

from __future__ import annotations

import math
from typing import Any

from qartsr_pipeline.calibration.evaluation.evaluation import Row

COLUMNS = {
    "psnr_y": ("PSNR-Y", "{:.2f}"),
    "ssim_y": ("SSIM-Y", "{:.4f}"),
    "gain": ("over bicubic", "{:+.2f}"),
    "share_of_gain": ("of full precision's gain", "{:.1%}"),
    "psnr_y_to_full_precision": ("PSNR-Y to full precision", "{:.2f}"),
    "ssim_y_to_full_precision": ("SSIM-Y to full precision", "{:.4f}"),
    "closer_than_bicubic": ("closer to it than bicubic", "{:+.2f}"),
    "seconds": ("s a picture", "{:.2f}"),
}


def mean(values: list[float]) -> float:
    """Arithmetic mean; infinite values (equal pictures) count only when all are."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def closer_than_bicubic(values: dict[str, list[float]]) -> float | None:
    """Mean over pictures of how many dB an output is closer to the full-precision output than bicubic is; None if unknown."""
    if "bicubic_to_full_precision" not in values:
        return None
    pairs = zip(values["psnr_y_to_full_precision"], values["bicubic_to_full_precision"], strict=True)
    return mean([output - bicubic for output, bicubic in pairs])


def summarize(rows: list[Row]) -> list[dict[str, Any]]:
    """One dictionary a row: name, kind, color_fix, full_precision, the mean of each metric, "gain" in PSNR-Y over bicubic,
    "share_of_gain" of the first full-precision model's under the same alignment, "closer_than_bicubic" in dB, and "per_picture".
    """
    bicubic = mean(next(row for row in rows if row.kind == "bicubic").values["psnr_y"])
    models = [row for row in rows if row.kind == "model"]
    reference = models[0].name if models and models[0].full_precision else None
    full_gain = {row.color_fix: mean(row.values["psnr_y"]) - bicubic for row in models if row.name == reference}
    summary = []
    for row in rows:
        line: dict[str, Any] = {
            "name": row.name,
            "kind": row.kind,
            "color_fix": row.color_fix,
            "full_precision": row.full_precision,
        }
        line |= {metric: mean(values) for metric, values in row.values.items()}
        if row.kind != "bicubic":
            line["gain"] = line["psnr_y"] - bicubic
        if row.kind == "model" and row.name != reference and full_gain.get(row.color_fix, 0) > 0:
            line["share_of_gain"] = line["gain"] / full_gain[row.color_fix]
        distance = closer_than_bicubic(row.values)
        if distance is not None:
            line["closer_than_bicubic"] = distance
        summary.append(json_safe(line | {"per_picture": row.values}))
    return summary


def json_safe(value: Any) -> Any:
    """Infinite and undefined numbers become None: JSON has neither."""
    if isinstance(value, dict):
        return {key: json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [json_safe(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def further_metrics(summary: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the metrics in the rows that are none of this project's own."""
    known = {*COLUMNS, "name", "kind", "color_fix", "full_precision", "per_picture", "bicubic_to_full_precision"}
    names = dict.fromkeys(key for line in summary for key in line if key not in known)
    return tuple(name for name in names if not name.endswith("_to_full_precision"))


def table(summary: list[dict[str, Any]], further: tuple[str, ...] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and cells, a line a row. Columns that no row fills are left out.

    Args:
        further: names of further metrics.
    """
    columns = COLUMNS | {name: (name.upper(), "{:.4f}") for name in further}
    columns |= {f"{name}_to_full_precision": (f"{name.upper()} to full precision", "{:.4f}") for name in further}
    columns = {key: column for key, column in columns.items() if any(line.get(key) is not None for line in summary)}
    lines = []
    for line in summary:
        colours = "" if line["kind"] in ("bicubic", "autoencoder") else line["color_fix"] or "as they come"
        cells = [layout.format(line[key]) if line.get(key) is not None else "" for key, (_, layout) in columns.items()]
        lines.append([line["name"], colours, *cells])
    return ["model", "colours", *(title for title, _ in columns.values())], lines


def markdown(summary: list[dict[str, Any]], further: tuple[str, ...] = ()) -> str:
    """`table` in Markdown, its columns aligned."""
    header, rows = table(summary, further)
    lines = [header, [":--", ":--", *["--:"] * (len(header) - 2)], *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
