"""Measures models on photographs: what the command line `calibration/evaluate.py` calls, on tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch

from calibration.data.degradations import as_bytes, bicubic_degradation
from calibration.data.photographs import read_photograph
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import fetch, is_quantized
from qartsr_pipeline.image.metrics import psnr_y, ssim_y
from qartsr_pipeline.image.picture import Picture
from qartsr_pipeline.image.resize import enlarged_size, pad_to_multiple, resize
from qartsr_pipeline.image.tile_size import MINIMUM_SIDE
from qartsr_pipeline.one_step import OneStepNetwork
from qartsr_pipeline.upscaling import Settings, StepReporter, finish, run_tiles

SCALE = 4
Metric = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Candidate:
    """A loaded model, its name in tables and whether it is the full-precision kind."""

    name: str
    pipeline: QArtSRPipeline
    full_precision: bool


@dataclass
class Row:
    """One line of the result: a method, with or without colour alignment, and its values picture by picture.

    Attributes:
        kind: "bicubic", "model", "bypass" (the UNet left out, z_H = z_L) or "autoencoder" (encoder and decoder on the original).
        color_fix: the alignment, None without.
        values: metric -> one value a picture. "psnr_y_to_full_precision" is infinite for equal pictures.
    """

    name: str
    kind: str
    color_fix: str | None
    full_precision: bool | None = None
    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for metric, value in values.items():
            self.values.setdefault(metric, []).append(value)


class Bypassed(OneStepNetwork):
    """The network without its UNet: z_H = z_L."""

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    @classmethod
    def of(cls, network: OneStepNetwork) -> Bypassed:
        return cls(**{part.name: getattr(network, part.name) for part in fields(network)})


def load_candidates(models: list[str], dtype: torch.dtype, device: str) -> list[Candidate]:
    """Loads checkpoint folders, shipped names or Hub ids. Rows are named by the last part, or the whole where two end alike.

    Raises:
        CheckpointError: see `QArtSRPipeline.from_pretrained`. ValueError: a model is given twice, or trained for another scale.
    """
    if len(set(models)) < len(models):
        raise ValueError("a model is given twice: name each one once")
    short = [Path(model).name for model in models]
    candidates = []
    for model, name in zip(models, short, strict=True):
        folder = fetch(model)
        pipeline = QArtSRPipeline.from_pretrained(folder, dtype=dtype).to(device)
        if pipeline.config.scale != SCALE:
            raise ValueError(
                f"{model} enlarges {pipeline.config.scale} times; the evaluation is for models that enlarge {SCALE} times"
            )
        pipeline.set_progress_bar_config(disable=True)
        candidates.append(Candidate(name if short.count(name) == 1 else model, pipeline, not is_quantized(folder)))
    return candidates


def read_original(path: Path) -> torch.Tensor:
    """A photograph as (1, 3, H, W) float32 in [0, 1], cut at the right and bottom to multiples of the scale."""
    pixels = torch.from_numpy(read_photograph(path).copy()).permute(2, 0, 1)[None].float() / 255
    height, width = (side // SCALE * SCALE for side in pixels.shape[-2:])
    return pixels[..., :height, :width]


def upscale(
    pipeline: QArtSRPipeline, network: OneStepNetwork, low: torch.Tensor, color_fixes: list[str | None], tile_size: int | None
) -> tuple[list[torch.Tensor], float]:
    """What the pipeline gives for ``low`` under each colour alignment, running the network once.

    Args:
        network: the pipeline's own, or a variation of it.
        low: (1, 3, h, w) in [0, 1].
        tile_size: None for the whole picture at once, however large.

    Returns:
        One (1, 3, 4h, 4w) of whole 255ths for each alignment; the seconds that the network took.
    """
    picture = Picture(rgb=low)
    size = enlarged_size(picture.size, SCALE)
    whole = -(-max(*size, MINIMUM_SIDE) // pipeline.multiple) * pipeline.multiple
    plan = pipeline.plan(picture, tile_size or whole, None)
    settings = Settings(SCALE, SCALE, None, True, False, None, pipeline.share_tile_statistics)
    enlarged = resize(low, size)
    start = time.perf_counter()
    result = run_tiles(
        network,
        pad_to_multiple(enlarged, plan.multiple, plan.minimum),
        plan,
        settings,
        StepReporter(pipeline, Silent(), None, []),
    )
    seconds = time.perf_counter() - start
    result = result[..., : size[0], : size[1]]
    outputs = [finish(picture, enlarged, result, replace(settings, color_fix=color_fix)).rgb for color_fix in color_fixes]
    return [as_bytes(output) for output in outputs], seconds


class Silent:
    """A progress bar that shows nothing."""

    def update(self) -> None:
        pass


def reconstruct(network: OneStepNetwork, high: torch.Tensor, multiple: int) -> torch.Tensor:
    """The original through encoder and decoder, same shape, of whole 255ths."""
    padded = pad_to_multiple(high, multiple, MINIMUM_SIDE)
    result = network.decode(network.encode(padded * 2 - 1)).float().cpu() / 2 + 0.5
    return as_bytes(result[..., : high.shape[-2], : high.shape[-1]])


@dataclass
class Evaluation:
    """Runs every model over pictures and collects rows.

    Attributes:
        color_fixes: alignments to measure, in the order of the rows; None is none.
        bypass: also measure full-precision models without their UNet, and their autoencoder on the original.
        metrics: further metrics by name, each (output, original) -> value.
    """

    candidates: list[Candidate]
    color_fixes: list[str | None]
    tile_size: int | None = None
    bypass: bool = False
    metrics: dict[str, Metric] = field(default_factory=dict)
    rows: dict[tuple[str, str, str | None], Row] = field(default_factory=dict)

    @property
    def reference(self) -> Candidate | None:
        """The first model if it is full precision: the others are compared with it."""
        return self.candidates[0] if self.candidates and self.candidates[0].full_precision else None

    @torch.no_grad()
    def picture(self, high: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Measures one original, (1, 3, H, W) in [0, 1]; yields what each method made of it (first alignment) with its name."""
        low = bicubic_degradation(high, SCALE)
        bicubic = as_bytes(resize(low, high.shape[-2:]))
        self._measure(Row("bicubic", "bicubic", None), bicubic, high)
        yield "bicubic", bicubic
        references: list[torch.Tensor | None] = [None] * len(self.color_fixes)
        for candidate in self.candidates:
            network = candidate.pipeline.network()
            outputs, seconds = upscale(candidate.pipeline, network, low, self.color_fixes, self.tile_size)
            for color_fix, output, reference in zip(self.color_fixes, outputs, references, strict=True):
                row = Row(candidate.name, "model", color_fix, candidate.full_precision)
                self._measure(row, output, high, reference, seconds=seconds)
            if candidate is self.reference:
                references = list(outputs)
            yield candidate.name, outputs[0]
            if self.bypass and candidate.full_precision:
                self._measure_parts(candidate, network, low, high)

    def _measure_parts(self, candidate: Candidate, network: OneStepNetwork, low: torch.Tensor, high: torch.Tensor) -> None:
        outputs, _ = upscale(candidate.pipeline, Bypassed.of(network), low, self.color_fixes, self.tile_size)
        for color_fix, output in zip(self.color_fixes, outputs, strict=True):
            self._measure(Row(f"{candidate.name}, UNet bypassed", "bypass", color_fix, True), output, high)
        output = reconstruct(network, high, candidate.pipeline.multiple)
        self._measure(Row(f"{candidate.name}, autoencoder on the original", "autoencoder", None, True), output, high)

    def _measure(
        self, row: Row, output: torch.Tensor, high: torch.Tensor, reference: torch.Tensor | None = None, **values: float
    ) -> None:
        row = self.rows.setdefault((row.name, row.kind, row.color_fix), row)
        if reference is not None:
            values["psnr_y_to_full_precision"] = psnr_y(output, reference)
        further = {name: metric(output, high) for name, metric in self.metrics.items()}
        row.add(psnr_y=psnr_y(output, high), ssim_y=ssim_y(output, high), **values, **further)
