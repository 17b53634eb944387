"""`evaluate_clips`: video models measured on clips, beside image models that run frame by frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.clips import clip_files, read_clip
from qartsr_pipeline.calibration.data.degradations import as_bytes, bicubic_degradation
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN, Metric, load_metrics
from qartsr_pipeline.calibration.evaluation.rows import TEMPORAL, TO_FULL_PRECISION, EvaluationRow, RowKey, make_rows
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.image.resize import resize
from qartsr_pipeline.offloading import quantized_layers
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.video.metrics import TemporalError

ClipModel = QArtSRPipeline | LSGQuantVideoPipeline
Clips = str | os.PathLike | Mapping[str, np.ndarray]


def evaluate_clips(
    models: Mapping[str, ClipModel],
    data: Clips,
    *,
    metrics: Sequence[str] = tuple(BUILT_IN),
    backbones: str | os.PathLike | None = None,
    progress: Callable[[str, str], None] | None = None,
    on_clip: Callable[[Mapping[str, Sequence[torch.Tensor]]], None] | None = None,
) -> list[EvaluationRow]:
    """Measures models on clips, beside bicubic enlargement. Prints nothing.

    Originals are cut to multiples of 4, every frame is reduced by 4 and rounded to 8 bits, and the clip is enlarged by every
    model; outputs are rounded to 8 bits and compared with the original. If the first model is in full precision, the others'
    outputs are compared with its outputs as well.

    Args:
        models: name of the row -> pipeline. An image model enlarges each frame by itself.
        data: a folder with one folder of images for each clip, or name -> clip (F, H, W, 3), uint8.
        metrics: as in `evaluate`, all with reference; means over the frames. The error of changes from frame to frame,
            "temporal_error", is always among the values: see `video.metrics.TemporalError`.
        backbones: as in `evaluate`.
        progress: called with a clip's and a model's name before it is enlarged.
        on_clip: called after each clip with its versions, name -> frames (1, 3, H, W) in [0, 1]: "low resolution", "bicubic", the
            models by their names, and "original".

    Returns:
        A row for bicubic, then for each model; ``images`` and ``per_image`` are clips.

    Raises:
        ValueError: no model, a clip of less than one frame or 16 pixels, or a metric without reference.
        OSError: no such folder, or no image in it. ImportError: a metric's package is not installed.
    """
    if not models:
        raise ValueError("`models` is empty: give at least one model")
    loaded = load_metrics(metrics, "cpu", backbones)
    blind = [name for name, metric in loaded.items() if not metric.needs_reference]
    if blind:
        raise ValueError(f"the metric {blind[0]!r} looks at single images: measure it with `evaluate`")
    keys = {name: RowKey(name, "model", None, not quantized_layers(model)) for name, model in models.items()}
    first = next(iter(keys.values()))
    measured: dict[RowKey, dict[str, list[float]]] = {key: {} for key in (RowKey("bicubic", "bicubic"), *keys.values())}
    for name, clip in _clips(data):
        high = _frames(name, clip)
        low = bicubic_degradation(high)
        reference: list[torch.Tensor] | None = None
        versions: dict[str, Sequence[torch.Tensor]] = {"low resolution": low.split(1)}
        for key in measured:
            if progress is not None:
                progress(name, key.name)
            frames = resize(low, (high.shape[-2], high.shape[-1])) if key.kind == "bicubic" else _enlarged(models[key.name], low)
            outputs = [as_bytes(frame[None]) for frame in frames]
            versions[key.name] = outputs
            values = _values(outputs, high, loaded)
            if key.kind == "model" and reference is not None:
                values |= {f"psnr_y{TO_FULL_PRECISION}": _mean(psnr_y(*pair) for pair in zip(outputs, reference, strict=True))}
            if key == first and first.full_precision:
                reference = outputs
            for metric, value in values.items():
                measured[key].setdefault(metric, []).append(value)
        if on_clip is not None:
            on_clip({**versions, "original": high.split(1)})
    return make_rows(measured)


def _clips(data: Clips) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(data, Mapping):
        yield from data.items()
    else:
        for name, paths in clip_files(Path(data)).items():
            yield name, read_clip(name, paths)


def _frames(name: str, clip: np.ndarray) -> torch.Tensor:
    """(F, 3, H, W) in [0, 1], cut to multiples of the scale."""
    height, width = (side // SCALE * SCALE for side in clip.shape[1:3])
    if len(clip) < 1 or min(height, width) < 4 * SCALE:
        raise ValueError(
            f"{name}: a clip of shape {clip.shape} cannot be measured; it needs a frame, and {4 * SCALE} pixels a side"
        )
    return torch.from_numpy(clip[:, :height, :width].copy()).permute(0, 3, 1, 2).float() / 255


def _enlarged(model: ClipModel, low: torch.Tensor) -> Iterator[torch.Tensor]:
    """(3, H, W) in [0, 1] for each of the frames (F, 3, h, w)."""
    if isinstance(model, LSGQuantVideoPipeline):
        yield from (torch.from_numpy(frame).permute(2, 0, 1) for frame in model.stream(low.unbind()))
    else:
        yield from (torch.as_tensor(model(frame, output_type="pt", return_dict=False)[0][0]) for frame in low)


def _values(outputs: Sequence[torch.Tensor], high: torch.Tensor, metrics: Mapping[str, Metric]) -> dict[str, float]:
    pairs = [(output, target[None]) for output, target in zip(outputs, high, strict=True)]
    values = {name: _mean(metric(*pair) for pair in pairs) for name, metric in metrics.items()}
    temporal = TemporalError()
    for output, target in pairs:
        temporal.add(output, target)
    return values if temporal.mean is None else values | {TEMPORAL: temporal.mean}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
