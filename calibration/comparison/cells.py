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
from calibration.comparison.setting import Comparison, Model, finished, write_json
from calibration.comparison.table import full_precision_name
from qartsr_pipeline.calibration.data.fingerprint import hardware, versions
from qartsr_pipeline.calibration.data.patches import as_pixels
from qartsr_pipeline.calibration.evaluation.measurement import BICUBIC, Candidate, Evaluation, ImageOutputs
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN, load_metrics
from qartsr_pipeline.calibration.evaluation.originals import originals_of
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.recipe import parse_bits
from qartsr_pipeline.calibration.start.other_grids import DynamicActivations, GroupedWeights, Offset
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import deployed_like

FULL_PRECISION = "full precision"
CROP = 192  # pixels, of the images on the sheet


def metrics_of(rows: list[EvaluationRow], name: str) -> dict[str, dict[str, Any]]:
    """Colour alignment ("none" without) -> metrics of the model ``name``, means and image by image, rounded."""
    lines = {row.color_fix or "none": row.to_json() for row in rows if row.kind == "model" and row.name == name}
    return {color_fix: {k: _rounded(v) for k, v in line.items() if k not in _NO_METRICS} for color_fix, line in lines.items()}


_NO_METRICS = ("name", "kind", "color_fix", "full_precision")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 5) if isinstance(value, float) else value


def measure(
    comparison: Comparison, model: Model, candidate: Candidate, on_image: Callable[[ImageOutputs], None]
) -> list[EvaluationRow]:
    """Rows of one pipeline on the evaluation images, compared with the model's full-precision outputs."""
    metrics = load_metrics([*BUILT_IN, *comparison.metrics], comparison.device)
    with tqdm(desc=f"measure {candidate.name}", unit="image", leave=False) as bar:

        def show(_: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        evaluation = Evaluation([candidate], metrics, references=model.references, progress=show, on_image=on_image)
        return evaluation.run(originals_of(comparison.evaluation))


def save_crop(path: Path, image: torch.Tensor, box: list[int]) -> None:
    """Writes a part of an image (1, 3, H, W) in [0, 1] as PNG; ``box`` is left, top and side."""
    left, top, side = box
    pixels = as_pixels(image[..., top : top + side, left : left + side])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def most_restored(bicubic: torch.Tensor, restored: torch.Tensor) -> tuple[float, list[int]]:
    """Where two images (1, 3, H, W) differ most: mean absolute difference there, and left, top and side of the square."""
    changed = (restored - bicubic).abs().mean(1, keepdim=True)
    side = min(CROP, *changed.shape[-2:])
    means = F.avg_pool2d(changed, side, stride=8)[0, 0]
    top, left = divmod(int(means.argmax()), means.shape[1])
    return float(means.max()), [left * 8, top * 8, side]


def full_precision(comparison: Comparison, name: str, again: bool = False) -> dict[str, Any]:
    """Metrics of a full-precision model, and which part of which image the sheet shows: read if measured before, else measured.

    Args:
        again: measure anyway, so that its outputs are at hand for cells to be compared with.
    """
    model = comparison.models[name]
    path = comparison.output / full_precision_name(name)
    settings = json.loads(json.dumps({"model": model.digest, "metrics": comparison.metrics} | comparison.data))
    known = finished(path, settings)
    if known and not again:
        return known
    best: dict[str, Any] = {"difference": -1.0}

    def choose(image: ImageOutputs) -> None:
        changed, box = most_restored(image.outputs[BICUBIC], image.outputs[FULL_PRECISION])
        if changed > best["difference"]:
            best.update(difference=changed, picture=Path(image.label).name, box=box, shown=dict(image.outputs))

    rows = measure(comparison, model, Candidate(FULL_PRECISION, model.pipeline, True), choose)
    if not name:
        for what, image in best["shown"].items():
            save_crop(comparison.output / "crops" / f"{what.replace(' ', '-')}.png", image, best["box"])
    bicubic = next(row for row in rows if row.kind == "bicubic")
    content = {
        "settings": settings,
        "timestep": model.pipeline.config["timestep"],
        "sheet": {"picture": best["picture"], "box": best["box"]},
        "bicubic": dict(bicubic.values),
        "metrics": metrics_of(rows, FULL_PRECISION),
        "environment": {"versions": versions(), "hardware": hardware(comparison.device)},
    }
    write_json(path, content)
    return content


def run_cell(comparison: Comparison, cell: Cell) -> dict[str, Any]:
    """Makes and measures a cell, or reads it if it is finished.

    Raises:
        FloatingPointError: training diverges.
        ValueError: there is a file of it with other settings.
        Stopped: by Ctrl-C; what is done of it is saved.
    """
    settings = comparison.settings(cell)
    path = comparison.output / "cells" / f"{cell.key}.json"
    known = finished(path, settings)
    if known:
        return known
    start = time.perf_counter()
    model = comparison.models[cell.model]
    if not model.references:
        full_precision(comparison, cell.model, again=True)
    trials = Trials(comparison, cell)
    chosen = sweep(trials) if cell.method.recipe.steps else {"factor": None, "losses": {}}
    recipe = with_rate(cell.method.recipe, chosen["factor"] or 1.0)
    pipeline, calibrated = trials.calibrate(recipe, cell.key)
    sheet = None if cell.model else full_precision(comparison, "")["sheet"]

    def keep(image: ImageOutputs) -> None:
        if sheet and Path(image.label).name == sheet["picture"]:
            save_crop(comparison.output / "crops" / f"{cell.key}.png", image.outputs[cell.method.label], sheet["box"])

    rows = measure(comparison, model, Candidate(cell.method.label, pipeline, False), keep)
    content = {
        "method": cell.method.name,
        "label": cell.method.label,
        "kind": cell.method.kind,
        "bits": cell.bits,
        "seed": cell.seed,
        "model": cell.model,
        "settings": settings,
        "learning_rate": {
            "factor": chosen["factor"],
            "held_out_losses": chosen["losses"],
            "bracketed": chosen.get("bracketed"),
        },
        "perceptual": model.perceptual.name if recipe.is_perceptual else None,
        "losses": {stage: [float(f"{loss:.4g}") for loss in losses] for stage, losses in calibrated.losses.items()},
        "layer_errors": {name: float(f"{error:.4g}") for name, error in calibrated.layer_errors.items()},
        "metrics": metrics_of(rows, cell.method.label),
        **stored_size(pipeline),
        **multiplications(model.pipeline, pipeline, cell.bits),
        "seconds": round(time.perf_counter() - start, 1),
        "environment": {"versions": versions(), "hardware": hardware(comparison.device)},
    }
    write_json(path, content)
    return content


def stored_size(pipeline: QArtSRPipeline) -> dict[str, float]:
    """What all quantized layers take, with everything that is stored of them, see `stored_tensors`.

    Returns:
        "megabytes" (10^6 bytes) and "bits_a_weight" (of the layers' weights; biases do not count as weights).
    """
    layers = family_of(pipeline).layers(pipeline).values()
    size = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in stored_tensors(layer).values())
    weights = sum(layer.weight.numel() for layer in layers)
    return {"megabytes": round(size / 1e6, 4), "bits_a_weight": round(8 * size / weights, 3)}


def multiplications(full: QArtSRPipeline, pipeline: QArtSRPipeline, bits: str) -> dict[str, float]:
    """What a pipeline in simulation multiplies, as shares of what its quantized layers do.

    Args:
        full: the same model at full precision.
        bits: the stated ones.

    Returns:
        "branch_cost" of all branches, and "wider": of the layers that have other bits.
    """
    family = family_of(pipeline)
    work, total, branches, wider = family.work(full), 0, 0, 0
    for name, layer in family.layers(pipeline).items():
        positions, weights = work.layers[name]
        own, scheme = positions.multiplications(weights), layer.layer_scheme
        total += own
        wider += own if (scheme.weight_bits, scheme.activation_bits) != parse_bits(bits) else 0
        each = positions.branch_multiplications(layer.weight.shape[0], layer.weight.shape[1], layer.weight[0, 0].numel())
        branches += scheme.rank_for(layer) * each
    return {"branch_cost": round(branches / max(total, 1), 4), "wider": round(wider / max(total, 1), 4)}


def stored_tensors(layer: CalibratingMixin) -> dict[str, torch.Tensor]:
    """Name -> tensor on the meta device, of the shape and dtype in which a checkpoint folder stores it.

    A grid that exists in simulation only is stored nowhere; its tensors are what a folder would hold: packed codes, float32
    scales of the weights' groups, a byte for the zero point of each where the grid is affine, the float32 offsets of its inputs,
    what says how dynamic activations are quantized, and the rest as in every deployed layer.
    """
    shape = layer.weight.shape
    tensors = dict(deployed_like(layer, layer.layer_scheme, "meta").named_buffers())
    if isinstance(layer, GroupedWeights) and "weight_scale" in tensors:
        outputs, inputs, *kernel = shape
        groups = outputs, _groups(layer, inputs), *kernel
        tensors["weight_scale"] = torch.empty(groups, device="meta")
        tensors.pop("weight_zero_point", None)
        if layer.affine:
            tensors["weight_zero_point"] = torch.empty(groups, dtype=torch.uint8, device="meta")
    if isinstance(layer, DynamicActivations):
        if layer.affine:
            tensors["input_shrink"] = torch.empty((), device="meta")
        else:
            tensors["input_offset"] = torch.empty((), device="meta")
            tensors["input_unsigned"] = torch.empty((), dtype=torch.uint8, device="meta")
        for name in ("input_scale", "input_zero_point"):
            tensors.pop(name, None)
    if isinstance(layer, Offset):
        tensors["input_offset"] = torch.empty(shape[1], device="meta")
    return tensors


def _groups(layer: GroupedWeights, inputs: int) -> int:
    return -(-inputs // layer.group_size)
