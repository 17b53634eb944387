"""The report of `qartsr evaluate`: written as JSON and as Markdown, and read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.saving import write_whole
from qartsr_pipeline.calibration.start.warm_start import record_of_folder


def made_by(folder: Path) -> dict[str, str]:
    """Method and bits that a folder's record names, as "method" and "bits"; nothing where it is not of this program's kind."""
    record = record_of_folder(folder)
    method = record["recipe"].get("method") if isinstance(record.get("recipe"), dict) else None
    bits = record.get("bits")
    return {"method": method, "bits": bits.lower()} if isinstance(method, str) and isinstance(bits, str) else {}


def report_text(report: dict[str, Any], table: str, pictures: Path | None = None, beside: Path | None = None) -> str:
    """The report as Markdown: what was measured, the table, and links to the comparison images.

    Args:
        table: the rows, see `markdown`.
        pictures, beside: the folder of the comparison images and that of the report, when both are written.
    """
    data, settings = report["data"], report["settings"]
    unchecked = [model for model, listed in data["unseen_by_record"].items() if not listed]
    lines = [
        f"{data['count']} images of {data['folder']}, low resolution: {settings['degradation']}. {report['hardware']},"
        f" {settings['dtype']}, {'tiles of ' + str(settings['tile_size']) if settings['tile_size'] else 'no tiles'}.",
        "",
        table,
    ]
    if not settings["ground_truth"]:
        lines += ["", "There is no ground truth: metrics that need one are measured against the output of full precision alone."]
    if unchecked:
        lines += [
            "",
            f"The records of {', '.join(unchecked)} list no files: whether these images were trained on is not checked.",
        ]
    if pictures and beside:
        folder = Path(os.path.relpath(pictures, beside))
        if data["page"]:
            lines.append(f"\n[Any two of them over one another](<{(folder / data['page']).as_posix()}>), for the first images.")
        lines += [f"\n![{name}](<{(folder / name).as_posix()}>)" for name in data["comparisons"]]
    return "\n".join(lines) + "\n"


def write_report(path: Path, report: dict[str, Any], text: str) -> None:
    """Writes the report as JSON and, beside it, as Markdown, each whole or not at all."""
    content = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, content.encode())
    write_whole(path.with_suffix(".md"), text.encode())


def read_report(path: str) -> dict[str, Any]:
    """A report that `write_report` wrote.

    Raises:
        OSError: no such file. ValueError: it is none.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = {"data", "settings", "rows"} <= report.keys()
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"--ours {path}: not a report of `qartsr evaluate`; one is written with --output")
    return report
