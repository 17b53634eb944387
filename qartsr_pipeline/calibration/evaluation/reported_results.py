"""What the papers report, and their tables beside our own measurements.

The numbers are those of the results tables of QArtSR (arXiv 2503.05584) and LSGQuant (arXiv 2602.03182).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

FULL_PRECISION = "full precision"


@dataclass(frozen=True)
class ReportedTable:
    """A part of a results table.

    Attributes:
        source: paper and arXiv number.
        model: the full-precision model that was quantized.
        results: (method, bits) -> PSNR in dB, LPIPS, MUSIQ; bits such as "w4a4", empty for full precision.
    """

    source: str
    model: str
    data: str
    results: dict[tuple[str, str], tuple[float, float, float]]


QARTSR = "QArtSR, arXiv 2503.05584"
LSGQUANT = "LSGQuant, arXiv 2602.03182"
OSEDIFF = "OSEDiff (Stable Diffusion 2.1, one step), T = 1000"
TABLES = (
    ReportedTable(
        QARTSR,
        OSEDIFF,
        "DIV2K_val, x4",
        {
            (FULL_PRECISION, ""): (24.95, 0.2325, 68.92),
            ("MaxMin", "w4a4"): (15.30, 0.7940, 46.27),
            ("LSQ", "w4a4"): (19.90, 0.5536, 45.25),
            ("Q-DM", "w4a4"): (19.40, 0.5003, 49.20),
            ("EfficientDM", "w4a4"): (10.82, 0.7858, 32.41),
            ("PassionSR", "w4a4"): (21.59, 0.5742, 42.39),
            ("SVDQuant", "w4a4"): (26.45, 0.3565, 51.14),
            ("QArtSR", "w4a4"): (24.93, 0.2914, 67.98),
            ("MaxMin", "w2a2"): (14.50, 0.8159, 33.22),
            ("LSQ", "w2a2"): (9.11, 0.8709, 44.51),
            ("Q-DM", "w2a2"): (20.03, 0.5858, 42.63),
            ("EfficientDM", "w2a2"): (12.10, 0.7471, 35.80),
            ("PassionSR", "w2a2"): (13.57, 0.8486, 46.53),
            ("SVDQuant", "w2a2"): (18.99, 0.4947, 43.83),
            ("QArtSR", "w2a2"): (25.51, 0.4124, 50.04),
        },
    ),
    ReportedTable(
        QARTSR,
        OSEDIFF,
        "RealSR, x4",
        {
            (FULL_PRECISION, ""): (25.27, 0.3027, 67.43),
            ("QArtSR", "w4a4"): (24.50, 0.3761, 64.87),
            ("QArtSR", "w2a2"): (24.92, 0.5825, 40.98),
        },
    ),
    ReportedTable(
        LSGQUANT,
        "a one-step video model on WAN 2.1",
        "UDM10 (video)",
        {
            (FULL_PRECISION, ""): (23.74, 0.2886, 63.85),
            ("MinMax", "w4a4"): (19.68, 0.5789, 28.97),
            ("QuaRot", "w4a4"): (22.72, 0.3489, 56.90),
            ("SVDQuant", "w4a4"): (21.92, 0.4770, 46.48),
            ("LSGQuant", "w4a4"): (23.80, 0.3169, 59.15),
        },
    ),
)
METHODS = ("MaxMin", "LSQ", "Q-DM", "EfficientDM", "PassionSR", "SVDQuant", "QArtSR")
METRICS = ("psnr_y", "lpips", "musiq")


def method_and_bits(row: dict[str, Any], made_by: dict[str, str] | None = None) -> tuple[str, str]:
    """Which line of the paper's table a row of ours belongs to.

    Args:
        made_by: "method" and "bits" that the model's record names. Without them its name tells: "svdquant-w4a4" is
            ("SVDQuant", "w4a4"), and a quantized model that names no method was made by ours.
    """
    if row["kind"] == "bicubic":
        return "bicubic", ""
    if row.get("full_precision"):
        return FULL_PRECISION, ""
    if made_by:
        return made_by["method"], made_by["bits"]
    name = row["name"].lower()
    letters = re.sub("[^a-z0-9]", "", name)
    method = next((method for method in METHODS if method.replace("-", "").lower() in letters), "QArtSR")
    bits = re.search(r"w\d+a\d+", name)
    return method, bits[0] if bits else ""


def our_lines(reports: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows of our reports by (method, bits); of each model only the row with the first colour alignment."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for report in reports:
        seen = set()
        for row in report["rows"]:
            if row["kind"] in ("bicubic", "model") and row["name"] not in seen:
                seen.add(row["name"])
                lines.setdefault(method_and_bits(row, report.get("made_by", {}).get(row["name"])), []).append(row)
    return lines


def reproduce(reports: list[dict[str, Any]]) -> str:
    """The reported tables as Markdown, QArtSR's with ours beside it, and what differs between the two.

    Args:
        reports: what `qartsr evaluate --output` wrote, any number.
    """
    parts = []
    for table in TABLES:
        beside = our_lines([report for report in reports if _table_of(report) is table])
        title = f"## {table.source}: {table.data}\n\nFull precision is {table.model}."
        parts.append(f"{title}\n\n{_table(table, beside, bool(beside))}")
    if reports:
        parts.append("## What differs\n\n" + "\n".join(f"- {line}" for line in differences(reports)))
    return "\n\n".join(parts)


def _table_of(report: dict[str, Any]) -> ReportedTable:
    """Beside which table ours goes: the first of the same photographs, otherwise the longest, which is the first."""
    layout = report["data"].get("layout")
    return next((table for table in TABLES if layout and table.data.startswith(layout)), TABLES[0])


def _table(table: ReportedTable, ours: dict[tuple[str, str], list[dict[str, Any]]], with_ours: bool) -> str:
    header = ["method", "bits", "PSNR", "LPIPS", "MUSIQ"]
    if with_ours:
        header += ["our model", "our PSNR-Y", "our LPIPS", "our MUSIQ"]
    lines = []
    for key in [*table.results, *(key for key in ours if key not in table.results)]:
        reported = table.results.get(key)
        numbers = [_number(value, digits) for value, digits in zip(reported or (None,) * 3, (2, 4, 2), strict=True)]
        rows: list[dict[str, Any] | None] = [*ours.get(key, [])]
        for index, row in enumerate(rows or [None]):
            cells = [key[0], key[1].upper(), *(numbers if index == 0 else [""] * 3)]
            if with_ours:
                values = [
                    _number(row.get(metric) if row else None, digits) for metric, digits in zip(METRICS, (2, 4, 2), strict=True)
                ]
                cells += [row["name"] if row else "", *values]
            lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, [":--", ":--", *["--:"] * (len(header) - 2)], *lines])


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def differences(reports: list[dict[str, Any]]) -> list[str]:
    """Why the two sides of the table cannot be compared number by number."""
    names = sorted(
        {row["name"] for report in reports for row in report["rows"] if row["kind"] == "model" and row["full_precision"]}
    )
    data = [report["data"] for report in reports]
    settings = [report["settings"] for report in reports]
    measured = {metric for report in reports for row in report["rows"] for metric in METRICS if row.get(metric) is not None}
    lacking = [name for metric, name in (("lpips", "LPIPS"), ("musiq", "MUSIQ")) if metric not in measured]
    ours = "; ".join(f"{entry['folder']}, {entry['count']} images" for entry in data)
    lines = [
        f"Model: the paper quantizes {OSEDIFF}; ours is {', '.join(names) or 'not among the reports'}.",
        f"Data: the paper has DIV2K_val and RealSR; ours is {ours}.",
        f"Low resolution: ours is {'; '.join(sorted({str(entry['degradation']) for entry in settings}))};"
        " which degradation DIV2K_val had there is not known to us.",
        "PSNR: ours is of the BT.601 luma without a border of 4 pixels, of results rounded to 8 bits;"
        " whether the paper's is of luma or RGB, and its border, is not known to us.",
        "LPIPS and MUSIQ: ours are version 0.1 with AlexNet, and pyiqa's with KonIQ-10k weights;"
        " the versions there are not known to us.",
        "Methods: the baselines here are our reading of their publications; a quantized model that names no method is by ours.",
    ]
    if lacking:
        lines.append(f"Not measured by us: {', '.join(lacking)} (`--metrics lpips musiq`).")
    return lines
