"""What a calibration run shows in its report: metrics and pictures of the quantized model, and how its training went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qartsr_pipeline.calibration.data.fingerprint import without_files
from qartsr_pipeline.calibration.data.photographs import as_pixels
from qartsr_pipeline.calibration.evaluation.evaluation import Candidate, degraded, evaluate_pipelines, read_original
from qartsr_pipeline.calibration.evaluation.evaluation_report import markdown, summarize
from qartsr_pipeline.calibration.report.report import ReportData, write_report
from qartsr_pipeline.calibration.training.stages import Calibrated

if TYPE_CHECKING:
    from calibration.run import Job

PICTURES = 4  # that are shown; all are measured


def nearest(picture: torch.Tensor, scale: int) -> torch.Tensor:
    """Every pixel as a square of ``scale`` pixels."""
    return picture.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def measure(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, np.ndarray]]]:
    """Rows of the metrics table, and the pictures to show."""
    candidates = [
        Candidate(job.model, job.full_precision, True),
        Candidate(f"{job.recipe.method} {job.args.bits}", job.pipeline, False),
    ]
    shown: dict[Path, dict[str, np.ndarray]] = {}

    def keep(path: Path, name: str, picture: torch.Tensor) -> None:
        if path in shown or len(shown) < PICTURES:
            shown.setdefault(path, {})[name] = as_pixels(picture)

    rows = evaluate_pipelines(candidates, job.evaluation, made=keep, degradation=job.args.degradation)
    sheets = []
    for path, pictures in shown.items():
        low = degraded(path, read_original(path), job.args.degradation)
        sheets.append({"low resolution": as_pixels(nearest(low, 4))} | pictures)
    return summarize(rows), sheets


def make_report(job: Job, calibrated: Calibrated, record: dict[str, Any], folder: Path, seconds: float) -> Path:
    """Measures the quantized pipeline, prints the table, writes the report and returns its page.

    Args:
        seconds: that the run took, since it was started or resumed.
    """
    metrics, pictures = measure(job)
    print(markdown(metrics))
    data = without_files(job.data)
    facts = {
        "model": f"{job.model}, timestep {job.pipeline.config.timestep}",
        "method": f"{job.recipe.method} ({job.recipe.source})",
        "our reading": job.recipe.reading,
        "bits": job.args.bits,
        "steps": str(sum(map(len, calibrated.losses.values()))),
        "calibration data": ", ".join(f"{name} {value}" for name, value in data.items()) + f"; {job.args.degradation}",
        "perceptual loss": record["perceptual"] or "none",
        "seed": str(job.args.seed),
        "seconds": f"{seconds:.0f}",
        "hardware": record["hardware"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "weights": "the original weights are unchanged: SHA-256 " + calibrated.weights[:16],
    }
    report = ReportData(
        title=f"{job.model}, {job.recipe.method} {job.args.bits}",
        facts={name: fact for name, fact in facts.items() if fact},
        losses=calibrated.losses,
        module_losses=[(turn["module"], turn["first"], turn["last"]) for turn in calibrated.turns],
        layer_errors=calibrated.layer_errors,
        bounds=calibrated.histograms,
        sweep=job.sweep,
        metrics=metrics,
        pictures=pictures,
    )
    return write_report(folder, report)
