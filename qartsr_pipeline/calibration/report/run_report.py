"""The report of a finished calibration run: metrics and images of the quantized model, and how its training went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.fingerprint import without_files
from qartsr_pipeline.calibration.data.patches import as_pixels
from qartsr_pipeline.calibration.evaluation.measurement import Candidate, Evaluation, ImageOutputs
from qartsr_pipeline.calibration.evaluation.originals import originals_of
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.report.report import ReportData, write_report
from qartsr_pipeline.calibration.training.progress import Calibrated
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.accounting import Accounting

SHOWN = 4  # images that are shown; all are measured


@dataclass(frozen=True)
class FinishedRun:
    """A calibration run that is through, and what is to be reported of it.

    Attributes:
        model_name: of the full-precision model, as it is called in the report.
        bits: such as "w4a4".
        degradation: of the calibration images, and of the evaluation images that come alone.
        data: what the record says of the calibration images.
        evaluation: files or images to measure on; see `evaluate`.
        record: the content of `quantization.json`.
        seconds: that the run took, since it was started or resumed.
        sweep: rows of the timestep search, if there was one.
    """

    model_name: str
    bits: str
    recipe: Recipe
    seed: int
    degradation: str
    data: dict[str, Any]
    full_precision: CheckpointPipeline
    quantized: CheckpointPipeline
    evaluation: list
    calibrated: Calibrated
    record: dict[str, Any]
    seconds: float
    sweep: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class RunReport:
    """The path of the report's page, and the rows of its table of image quality."""

    page: Path
    rows: list[EvaluationRow]


def make_report(run: FinishedRun, folder: Path) -> RunReport:
    """Measures the quantized pipeline beside the full-precision one and writes the report.

    Raises:
        ValueError: an image cannot be measured. OSError: one cannot be read, or the report cannot be written.
    """
    rows, images = _measure(run)
    return RunReport(write_report(folder, report_data(run, rows, images)), rows)


def report_data(
    run: FinishedRun,
    rows: list[EvaluationRow],
    images: list[dict[str, np.ndarray]],
    strips: dict[str, np.ndarray] | None = None,
) -> ReportData:
    """What the report says of the run.

    Args:
        rows: of the table of metrics.
        images: name -> (H, W, 3) uint8, of one size, for each image that is shown.
        strips: film strips of clips, name -> (H, W, 3) uint8.
    """
    calibrated = run.calibrated
    return ReportData(
        title=f"{run.model_name}, {run.recipe.method} {run.bits}",
        facts={name: fact for name, fact in _facts(run).items() if fact},
        losses=calibrated.losses,
        module_losses=[(turn["module"], turn["first"], turn["last"]) for turn in calibrated.turns],
        curve=calibrated.curve,
        sensitivities=calibrated.sensitivities,
        layer_errors=calibrated.layer_errors,
        bounds=calibrated.histograms,
        sweep=run.sweep,
        metrics=rows,
        pictures=images,
        strips=strips or {},
    )


def _measure(run: FinishedRun) -> tuple[list[EvaluationRow], list[dict[str, np.ndarray]]]:
    """Rows of the metrics table, and the images to show: name -> (H, W, 3) uint8."""
    candidates = [
        Candidate(run.model_name, cast(QArtSRPipeline, run.full_precision), True),
        Candidate(f"{run.recipe.method} {run.bits}", cast(QArtSRPipeline, run.quantized), False),
    ]
    shown: list[dict[str, np.ndarray]] = []

    def keep(image: ImageOutputs) -> None:
        if len(shown) < SHOWN:
            shown.append(shown_versions({"low resolution": image.low, **image.outputs}))

    evaluation = Evaluation(candidates, degradation=run.degradation, on_image=keep)
    return evaluation.run(originals_of(run.evaluation)), shown


def shown_versions(images: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Images (1, 3, H, W) in [0, 1] as pixels; every pixel of the one of low resolution, which is the first, as a square."""
    name, low = next(iter(images.items()))
    squares = low.repeat_interleave(SCALE, -2).repeat_interleave(SCALE, -1)
    return {version: as_pixels(image) for version, image in {**images, name: squares}.items()}


def _costs(record: dict[str, Any]) -> dict[str, str]:
    """Bits a weight and multiplications; nothing for what exists in simulation only."""
    if "accounting" not in record:
        return {}
    bits, multiplications = Accounting.from_dict(record["accounting"]).sentences()
    return {"bits a weight": bits, "multiplications": multiplications}


def _facts(run: FinishedRun) -> dict[str, str]:
    """What was run, as lines of text; those that do not apply are empty."""
    record, data = run.record, without_files(run.data)
    return {
        "model": f"{run.model_name}, timestep {run.quantized.config['timestep']}",
        "method": f"{run.recipe.method} ({run.recipe.source})",
        "our reading": run.recipe.reading,
        "bits": run.bits,
        **_costs(record),
        "steps": str(sum(map(len, run.calibrated.losses.values()))),
        "calibration data": ", ".join(f"{name} {value}" for name, value in data.items()) + f"; {run.degradation}",
        "perceptual loss": record["perceptual"] or "none",
        "seed": str(run.seed),
        "seconds": f"{run.seconds:.0f}",
        "hardware": record["hardware"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "weights": "the original weights are unchanged: SHA-256 " + run.calibrated.weights[:16],
    }
