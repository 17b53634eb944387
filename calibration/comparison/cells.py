"""One cell of a comparison: made, measured, written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from calibration.comparison.learning_rate import Trials, sweep, with_rate
from calibration.comparison.methods import Cell
from calibration.comparison.setting import Comparison, Model, write_json
from calibration.comparison.table import full_precision_name
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.fingerprint import hardware, versions
from qartsr_pipeline.calibration.data.photographs import as_pixels
from qartsr_pipeline.calibration.evaluation.evaluation import Candidate, evaluate_pipelines
from qartsr_pipeline.calibration.evaluation.evaluation_report import mean, summarize
from qartsr_pipeline.calibration.evaluation.perceptual_metrics import load_metrics
from qartsr_pipeline.calibration.training.stages import all_layers

COLOR_FIXES = ("wavelet", None)  # the pipeline's default, and the network's own colours
FULL_PRECISION = "full precision"
CROP = 192  # pixels, of the sheet's pictures


def stored_size(pipeline: QArtSRPipeline) -> dict[str, float]:
    """What the quantized layers take: codes, 16-bit branches and one 16-bit number a weight scale.

    Returns:
        "megabytes" (10^6 bytes) and "bits_a_weight".
    """
    bits = weights = 0
    for layer in all_layers(pipeline).values():
        weight, scheme = layer.weight, layer.layer_scheme
        channels = weight.shape[1]
        size = getattr(layer, "group_size", 0)
        scales = weight.numel() // channels * -(-channels // size) if size else weight.shape[0]
        weights += weight.numel()
        bits += weight.numel() * scheme.weight_bits + (16 * scales if scheme.weight_bits < 16 else 0)
        if layer.has_branch:
            bits += 16 * (layer.branch_up.numel() + layer.branch_down.numel())
    return {"megabytes": round(bits / 8e6, 4), "bits_a_weight": round(bits / weights, 3)}


def measured(rows: list, name: str) -> dict[str, dict[str, Any]]:
    """Colour alignment ("none" without) -> metrics of the model ``name``, means and picture by picture."""
    lines = {line["color_fix"] or "none": line for line in summarize(rows) if line["kind"] == "model" and line["name"] == name}
    return {color_fix: {k: _rounded(v) for k, v in line.items() if k not in _NO_METRICS} for color_fix, line in lines.items()}


_NO_METRICS = ("name", "kind", "color_fix", "full_precision")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) else value


def evaluate(comparison: Comparison, model: Model, candidate: Candidate, made: Callable[..., None]) -> list:
    """Rows of one pipeline on the evaluation pictures, compared with the model's full-precision outputs."""
    metrics = load_metrics(comparison.metrics, comparison.device)
    with tqdm(total=len(comparison.evaluation), desc=f"measure {candidate.name}", unit="picture", leave=False) as bar:

        def seen(path: Path, name: str, picture: torch.Tensor) -> None:
            bar.update(name == "original")
            made(path, name, picture)

        return evaluate_pipelines(
            [candidate], comparison.evaluation, COLOR_FIXES, metrics=metrics, references=model.references, made=seen
        )


def save_crop(path: Path, picture: torch.Tensor, box: list[int]) -> None:
    """Writes a part of (1, 3, H, W) in [0, 1] as PNG; ``box`` is left, top and side."""
    left, top, side = box
    pixels = as_pixels(picture[..., top : top + side, left : left + side])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def most_restored(bicubic: torch.Tensor, restored: torch.Tensor) -> tuple[float, list[int]]:
    """Where two pictures (1, 3, H, W) differ most: mean absolute difference there, and left, top and side of the square."""
    changed = (restored - bicubic).abs().mean(1, keepdim=True)
    side = min(CROP, *changed.shape[-2:])
    means = F.avg_pool2d(changed, side, stride=8)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return float(means.max()), [left * 8, top * 8, side]


def full_precision(comparison: Comparison, name: str, again: bool = False) -> dict[str, Any]:
    """How a full-precision model does, and which part of which picture the sheet shows: measured, or read where it was.

    Args:
        again: measure anyway, so that its outputs are at hand for cells to be compared with.
    """
    model = comparison.models[name]
    path = comparison.output / full_precision_name(name)
    settings = json.loads(json.dumps({"model": model.digest, "metrics": comparison.metrics} | comparison.data))
    known = comparison.finished(path, settings)
    if known and not again:
        return known
    best: dict[str, Any] = {"difference": -1.0}
    pictures: dict[str, torch.Tensor] = {}

    def made(where: Path, what: str, picture: torch.Tensor) -> None:
        pictures[what] = picture
        if what == "original":
            changed, box = most_restored(pictures["bicubic"], pictures[FULL_PRECISION])
            if changed > best["difference"]:
                best.update(difference=changed, picture=where.name, box=box, shown=dict(pictures))

    rows = evaluate(comparison, model, Candidate(FULL_PRECISION, model.pipeline, True), made)
    if not name:
        for what, picture in best["shown"].items():
            save_crop(comparison.output / "crops" / f"{what.replace(' ', '-')}.png", picture, best["box"])
    bicubic = next(row for row in rows if row.kind == "bicubic")
    content = {
        "settings": settings,
        "timestep": model.pipeline.config.timestep,
        "sheet": {"picture": best["picture"], "box": best["box"]},
        "bicubic": {metric: mean(values) for metric, values in bicubic.values.items()},
        "metrics": measured(rows, FULL_PRECISION),
        "environment": {"versions": versions(), "hardware": hardware(comparison.device)},
    }
    write_json(path, content)
    return content


def run_cell(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """Makes and measures a cell, or reads it where it is finished.

    Raises:
        FloatingPointError: training diverges. ValueError: it is there, of other settings. StoppedError: by Ctrl-C; what is
            done of it is saved.
    """
    settings = comparison.settings(cell)
    path = comparison.output / "cells" / f"{cell.key}.json"
    known = comparison.finished(path, settings)
    if known:
        return known
    start = time.perf_counter()
    model = comparison.models[cell.model]
    if not model.references:
        full_precision(comparison, cell.model, again=True)
    trials = Trials(comparison, cell)
    chosen = sweep(trials) if cell.method.recipe.stages else {"factor": None, "losses": {}}
    recipe = with_rate(cell.method.recipe, chosen["factor"] or 1.0)
    pipeline, calibrated = trials.calibrate(recipe, cell.key)
    sheet = None if cell.model else full_precision(comparison, "")["sheet"]

    def made(where: Path, what: str, picture: torch.Tensor) -> None:
        if sheet and where.name == sheet["picture"] and what == cell.method.label:
            save_crop(comparison.output / "crops" / f"{cell.key}.png", picture, sheet["box"])

    rows = evaluate(comparison, model, Candidate(cell.method.label, pipeline, False), made)
    content = {
        "method": cell.method.name,
        "label": cell.method.label,
        "kind": cell.method.kind,
        "bits": cell.bits,
        "seed": cell.seed,
        "model": cell.model,
        "settings": settings,
        "learning_rate": {"factor": chosen["factor"], "held_out_losses": chosen["losses"]},
        "perceptual": model.perceptual.name if recipe.is_perceptual else None,
        "losses": {stage: [float(f"{loss:.4g}") for loss in losses] for stage, losses in calibrated.losses.items()},
        "layer_errors": {name: float(f"{error:.4g}") for name, error in calibrated.layer_errors.items()},
        "metrics": measured(rows, cell.method.label),
        **stored_size(pipeline),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {"versions": versions(), "hardware": hardware(comparison.device)},
    }
    write_json(path, content)
    return content
