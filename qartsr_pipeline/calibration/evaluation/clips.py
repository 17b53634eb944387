"""`evaluate_clips`: models measured on clips, image models frame by frame."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.clips import clip_files, read_clip
from qartsr_pipeline.calibration.data.degradations import as_bytes, bicubic_degradation
from qartsr_pipeline.calibration.evaluation.api import check_unseen, named_models
from qartsr_pipeline.calibration.evaluation.measurement import BICUBIC, ORIGINAL
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN, Metric, load_metrics
from qartsr_pipeline.calibration.evaluation.peers import Upscaler
from qartsr_pipeline.calibration.evaluation.rows import (
    E_WARP,
    SECONDS_A_FRAME,
    TEMPORAL,
    TO_FULL_PRECISION,
    EvaluationRow,
    RowKey,
    make_rows,
)
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.checkpoint_files.checking import VIDEO_PIPELINE_CLASS, named_class, read_model_index
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.image.resize import resize
from qartsr_pipeline.loading import load_kind_quietly
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.video.metrics import TemporalError, check_optical_flow, optical_flow, warping_error

ClipModel: TypeAlias = QArtSRPipeline | LSGQuantVideoPipeline
Clips: TypeAlias = str | os.PathLike | Mapping[str, "np.ndarray | list[Path]"]
SHORTEST_SIDE = 4 * SCALE


@dataclass(frozen=True)
class ClipOutputs:
    """What became of one clip.

    Attributes:
        name: of the clip.
        low: (F, 3, H / 4, W / 4) float32 in [0, 1].
        outputs: method -> its frames, (1, 3, H, W) float32 in [0, 1] each: "bicubic", the peers, the models, "original".
    """

    name: str
    low: torch.Tensor
    outputs: Mapping[str, Sequence[torch.Tensor]]


def evaluate_clips(
    models: ClipModel | str | os.PathLike | Sequence[ClipModel | str | os.PathLike] | Mapping[str, ClipModel | str | os.PathLike],
    data: Clips,
    *,
    metrics: Sequence[str] = tuple(BUILT_IN),
    flows: Mapping[str, Sequence[np.ndarray]] | None = None,
    frames: int | None = None,
    align_color: bool = True,
    tile_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    peers: Mapping[str, Upscaler] | None = None,
    backbones: str | os.PathLike | None = None,
    progress: Callable[[str, str], None] | None = None,
    on_clip: Callable[[ClipOutputs], None] | None = None,
) -> list[EvaluationRow]:
    """Measures models on clips, beside bicubic enlargement. Prints nothing.

    Originals are cut to multiples of 4, every frame is reduced by 4 and rounded to 8 bits, and the clip is enlarged by every
    model; outputs are rounded to 8 bits and compared with the original. If the first model is in full precision, the others'
    outputs are compared with its outputs as well. One clip at a time is in memory, with what the first model makes of it.

    Args:
        models: as in `evaluate`, video and image models. An image model enlarges each frame by itself.
        data: a folder with video files, or with one folder of images for each clip; or name -> clip (F, H, W, 3) uint8, or the
            files of one, see `clip_files`.
        metrics: as in `evaluate`; means over the frames. "e_warp" is E_warp times 1000, by the originals' motion: see
            `video.metrics.optical_flow` and `warping_error`. The error of changes from frame to frame, "temporal_error", is
            always among the values: see `video.metrics.TemporalError`.
        flows: name of a clip -> its motion where that is known, F - 1 arrays (H, W, 2) as `warping_error` takes them, H and W cut
            to multiples of 4. It then takes the place of the estimate.
        frames: only so many of each clip, the first ones.
        align_color: False for the networks' own colours; True for the alignment that each pipeline has by default.
        tile_size: as in the pipelines' calls.
        device, dtype: for models that are loaded here; None for the CPU and what the folder stores. A pipeline stays as it is.
        peers: name of a row -> another upscaler, frame by frame: a function of (1, 3, h, w) to (1, 3, 4h, 4w), float32 in [0, 1].
        backbones: as in `evaluate`.
        progress: called with a clip's and a row's name before it is enlarged.
        on_clip: called with each clip's outputs, which are all kept for it.

    Returns:
        A row for bicubic, for each peer, then for each model; ``images`` and ``per_image`` are clips; of one frame, a clip has
        NaN for what is measured from frame to frame, which does not count in means. "seconds_a_frame" is among the values.

    Raises:
        ValueError: an argument that is not as described; a clip of less than one frame or 16 pixels, with images of different
            sizes, in HDR, damaged, or that a model was made with, by its record; an output of another size or not finite.
        OSError: no such folder, or no clip in it. CheckpointError: a model that is damaged or unavailable.
        ImportError: a metric's package is not installed.

    Example:
        >>> import numpy as np
        >>> from qartsr_pipeline.calibration.evaluation import evaluate_clips
        >>> clip = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
        >>> bicubic, model = evaluate_clips("tiny-w4a4", {"noise": clip})
        >>> model.name, model.images, sorted(model.values)
        ('tiny-w4a4', 1, ['psnr_y', 'seconds_a_frame', 'ssim_y', 'temporal_error'])
    """
    others = dict(peers or {})
    named = named_models(models, needed=not others)
    taken = [name for name in others if name in (*named, BICUBIC, ORIGINAL)]
    if taken:
        raise ValueError(f"there are two rows named {taken[0]!r}: give the peer another name")
    clips = dict(data) if isinstance(data, Mapping) else clip_files(Path(data))
    if not clips:
        raise ValueError("`data` is empty: give at least one clip")
    if E_WARP in metrics and any(name not in (flows or {}) for name in clips):
        check_optical_flow()
    places = "cpu" if device is None else str(device)
    loaded = load_metrics([name for name in metrics if name != E_WARP], places, backbones)
    sources = {name: fetch(model) if isinstance(model, (str, os.PathLike)) else model for name, model in named.items()}
    files = [path for clip in clips.values() if not isinstance(clip, np.ndarray) for path in clip]
    check_unseen([source for source in sources.values() if isinstance(source, Path)], files)
    pipelines = {
        name: load_any(source, dtype, device) if isinstance(source, Path) else source for name, source in sources.items()
    }
    measurement = _Measurement(pipelines, others, loaded, align_color, tile_size, progress)
    for name, clip in clips.items():
        pixels = clip[:frames] if isinstance(clip, np.ndarray) else read_clip(name, clip, frames)
        try:
            high = frames_to_measure(pixels)
            motion = None
            if E_WARP in metrics and len(high) > 1:
                known = (flows or {}).get(name)
                motion = estimated_motion(high) if known is None else known[: len(high) - 1]
            outputs = measurement.add(name, high, motion, keep=on_clip is not None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if on_clip is not None:
            on_clip(ClipOutputs(name, bicubic_degradation(high), outputs | {ORIGINAL: list(high.split(1))}))
    return make_rows(measurement.measured, len(clips))


def is_video_model(folder: Path) -> bool:
    """Whether a checkpoint folder names the pipeline of clips. Raises CheckpointError if it cannot be read."""
    return named_class(read_model_index(folder)) == VIDEO_PIPELINE_CLASS


def load_any(folder: Path, dtype: torch.dtype | None, device: str | torch.device | None) -> ClipModel:
    """The pipeline of a checkpoint folder of either kind; None for the folder's own dtype and for the CPU."""
    wanted = {} if dtype is None else {"dtype": dtype}
    pipeline: ClipModel
    if is_video_model(folder):
        pipeline = load_kind_quietly(LSGQuantVideoPipeline, folder, **wanted)
    else:
        pipeline = load_kind_quietly(QArtSRPipeline, folder, **wanted)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def frames_to_measure(clip: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 -> (F, 3, H, W) float32 in [0, 1], cut to multiples of the scale; ValueError if too little is left."""
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8:
        raise ValueError(f"a clip must be a uint8 array (F, H, W, 3), this one is {clip.dtype} of shape {clip.shape}")
    height, width = (side // SCALE * SCALE for side in clip.shape[1:3])
    if len(clip) < 1 or min(height, width) < SHORTEST_SIDE:
        raise ValueError(f"a clip of shape {clip.shape} cannot be measured; it needs a frame, and {SHORTEST_SIDE} pixels a side")
    return torch.from_numpy(clip[:, :height, :width].copy()).permute(0, 3, 1, 2).float() / 255


def estimated_motion(high: torch.Tensor) -> list[np.ndarray]:
    """The `optical_flow` from each frame of (F, 3, H, W) to the one before."""
    frames = high.permute(0, 2, 3, 1).numpy()
    return [optical_flow(frame, before) for before, frame in pairwise(frames)]


class _Measurement:
    """Models and metrics that clips go through; ``measured``, the values of each row, grows with every clip."""

    def __init__(
        self,
        models: Mapping[str, ClipModel],
        peers: Mapping[str, Upscaler],
        metrics: Mapping[str, Metric],
        align_color: bool,
        tile_size: int | None,
        progress: Callable[[str, str], None] | None,
    ) -> None:
        self._models, self._peers, self._metrics, self._progress = models, peers, metrics, progress
        self._align_color, self._tile_size = align_color, tile_size
        self._clips = 0  # so far
        keys = [self._key(name, model) for name, model in models.items()]
        self._reference = keys[0] if keys and keys[0].full_precision else None
        bicubic = RowKey(BICUBIC, "bicubic")
        self.measured: dict[RowKey, dict[str, list[float]]] = {
            key: {} for key in (bicubic, *(RowKey(name, "peer") for name in peers), *keys)
        }

    def _key(self, name: str, model: ClipModel) -> RowKey:
        parts = [part for part in model.components.values() if isinstance(part, torch.nn.Module)]
        layers = [layer for part in parts for layer in part.modules()]
        quantized = any(isinstance(layer, (CalibratingMixin, DeployedLayer)) for layer in layers)
        color_fix = ("adain" if isinstance(model, LSGQuantVideoPipeline) else "wavelet") if self._align_color else None
        return RowKey(name, "model", color_fix, not quantized)

    def add(
        self, name: str, high: torch.Tensor, motion: Sequence[np.ndarray] | None, keep: bool
    ) -> dict[str, list[torch.Tensor]]:
        """Measures everything on one clip (F, 3, H, W); returns the outputs, frame by frame, if they are to be kept."""
        low, originals = bicubic_degradation(high), list(high.split(1))
        kept: dict[str, list[torch.Tensor]] = {}
        reference: list[torch.Tensor] | None = None
        bicubic: list[torch.Tensor] = []
        for key, row in self.measured.items():
            if self._progress is not None:
                self._progress(name, key.name)
            start = time.perf_counter()
            outputs = [as_bytes(frame) for frame in self._enlarged(key, low)]
            seconds = (time.perf_counter() - start) / len(high)
            if any(output.shape != originals[0].shape or not output.isfinite().all() for output in outputs):
                shape = (*high.shape[-2:],)
                raise ValueError(f"{key.name} made a frame that is not finite or not of {shape} pixels (height, width)")
            bicubic = bicubic or outputs  # the first row
            values = self._values(outputs, originals, motion)
            if key.kind != "bicubic":
                values[SECONDS_A_FRAME] = seconds
            if key.kind == "model" and reference is not None:
                values |= self._distances(outputs, reference, bicubic)
            if key == self._reference:
                reference = outputs
            for metric, value in values.items():
                if math.isnan(value):
                    raise ValueError(f"the metric {metric!r} is undefined (NaN) for {key.name}: leave out the metric or the clip")
                row.setdefault(metric, [math.nan] * self._clips).append(value)
            for column in row.values():  # a clip of one frame has no motion
                column += [math.nan] * (self._clips + 1 - len(column))
            if keep:
                kept[key.name] = outputs
        self._clips += 1
        return kept

    @torch.no_grad()
    def _enlarged(self, key: RowKey, low: torch.Tensor) -> Iterable[torch.Tensor]:
        """(1, 3, H, W) in [0, 1] for each of the frames (F, 3, h, w)."""
        if key.kind == "bicubic":
            return resize(low, (SCALE * low.shape[-2], SCALE * low.shape[-1])).split(1)
        if key.kind == "peer":
            return [self._peers[key.name](frame).float().cpu() for frame in low.split(1)]
        model, tile_size = self._models[key.name], self._tile_size
        if isinstance(model, LSGQuantVideoPipeline):
            made = model.stream(low.unbind(), upscale=SCALE, tile_size=tile_size, color_fix=key.color_fix)
            return (torch.from_numpy(frame).permute(2, 0, 1)[None] for frame in made)
        calls = (model(frame, SCALE, tile_size, color_fix=key.color_fix, output_type="pt", return_dict=False) for frame in low)
        return (torch.as_tensor(made[0]) for made in calls)

    def _values(
        self, outputs: Sequence[torch.Tensor], originals: Sequence[torch.Tensor], motion: Sequence[np.ndarray] | None
    ) -> dict[str, float]:
        pairs = list(zip(outputs, originals, strict=True))
        values = {name: _mean(metric(*pair) for pair in pairs) for name, metric in self._metrics.items()}
        temporal = TemporalError()
        for pair in pairs:
            temporal.add(*pair)
        if motion is not None:
            values[E_WARP] = warping_error((output[0].permute(1, 2, 0).numpy() for output in outputs), motion)
        return values if temporal.mean is None else values | {TEMPORAL: temporal.mean}

    def _distances(
        self, outputs: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], bicubic: Sequence[torch.Tensor]
    ) -> dict[str, float]:
        """How far outputs, and bicubic, are from the full-precision ones."""
        compared = {name: metric for name, metric in self._metrics.items() if metric.needs_reference}
        distances = {
            f"{name}{TO_FULL_PRECISION}": _mean(metric(*pair) for pair in zip(outputs, reference, strict=True))
            for name, metric in compared.items()
        }
        if "psnr_y" in compared:
            distances[f"{BICUBIC}{TO_FULL_PRECISION}"] = _mean(psnr_y(*pair) for pair in zip(bicubic, reference, strict=True))
        return distances


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
