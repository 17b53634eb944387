"""Measures models on photographs: what the command line `calibration/evaluate.py` calls, on tensors.

Within a program, with models in memory, simulated or deployed:

    rows = evaluate_pipelines([Candidate.of("full", teacher), Candidate.of("w4a4", student)], find_pairs(folder)[1])
    summary = summarize(rows)
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS, as_bytes
from qartsr_pipeline.calibration.data.paired_folders import SCALE, ImagePair, read_pair
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.image.metrics import psnr_y, ssim_y
from qartsr_pipeline.image.picture import Picture
from qartsr_pipeline.image.resize import enlarged_size, pad_to_multiple, resize
from qartsr_pipeline.image.tile_size import MINIMUM_SIDE
from qartsr_pipeline.one_step import OneStepNetwork
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.upscaling import Settings, StepReporter, finish, run_tiles

Metric = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass
class Candidate:
    """A loaded model, its name in tables and whether it is the full-precision kind."""

    name: str
    pipeline: QArtSRPipeline
    full_precision: bool

    @classmethod
    def of(cls, name: str, pipeline: QArtSRPipeline) -> Candidate:
        """A model in memory; one with a calibrating or deployed layer is quantized.

        Raises:
            ValueError: it enlarges by another factor.
        """
        if pipeline.config.scale != SCALE:
            raise ValueError(
                f"{name} enlarges {pipeline.config.scale} times; the evaluation is for models that enlarge {SCALE} times"
            )
        pipeline.set_progress_bar_config(disable=True)
        layers = [layer for model in (pipeline.unet, pipeline.vae) for layer in model.modules()]
        return cls(name, pipeline, not any(isinstance(layer, (CalibratingMixin, DeployedLayer)) for layer in layers))


@dataclass
class Row:
    """One line of the result: a method, with or without colour alignment, and its values picture by picture.

    Attributes:
        kind: "bicubic", "model", "bypass" (the UNet left out, z_H = z_L) or "autoencoder" (encoder and decoder on the original).
        color_fix: the alignment, None without.
        values: metric -> one value a picture. "psnr_y_to_full_precision" is infinite for equal pictures;
            "bicubic_to_full_precision" is the PSNR-Y of bicubic to the same full-precision output.
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


def row_names(models: list[str]) -> dict[str, str]:
    """Model -> name of its rows: the last part, or the whole where two end alike. Raises ValueError if one is given twice."""
    if len(set(models)) < len(models):
        raise ValueError("a model is given twice: name each one once")
    short = [Path(model).name for model in models]
    return {model: name if short.count(name) == 1 else model for model, name in zip(models, short, strict=True)}


def load_candidates(models: list[str], dtype: torch.dtype, device: str) -> list[Candidate]:
    """Loads checkpoint folders, shipped names or Hub ids, named as `row_names` says.

    Raises:
        CheckpointError: see `QArtSRPipeline.from_pretrained`. ValueError: a model is given twice, or trained for another scale.
    """
    return [
        Candidate.of(name, QArtSRPipeline.from_pretrained(fetch(model), dtype=dtype).to(device))
        for model, name in row_names(models).items()
    ]


def read_original(path: Path) -> torch.Tensor:
    """A photograph as (1, 3, H, W) float32 in [0, 1], cut at the right and bottom to multiples of the scale."""
    return read_pair(ImagePair(path))[0]


def degraded(path: Path, high: torch.Tensor, degradation: str) -> torch.Tensor:
    """An original's low-resolution picture (1, 3, H / 4, W / 4); what is random in it goes by the file's name.

    Args:
        degradation: of `qartsr_pipeline.calibration.data.degradations.DEGRADATIONS`.
    """
    return DEGRADATIONS[degradation](high, SCALE, np.random.default_rng(zlib.crc32(path.name.encode())))


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
        metrics: further metrics by name, each (output, original) -> value. Those with an attribute `needs_reference` that is
            true are measured to the full-precision output as well.
    """

    candidates: list[Candidate]
    color_fixes: Sequence[str | None]
    tile_size: int | None = None
    bypass: bool = False
    metrics: dict[str, Metric] = field(default_factory=dict)
    rows: dict[tuple[str, str, str | None], Row] = field(default_factory=dict)

    @property
    def reference(self) -> Candidate | None:
        """The first model if it is full precision: the others are compared with it."""
        return self.candidates[0] if self.candidates and self.candidates[0].full_precision else None

    @torch.no_grad()
    def picture(
        self, high: torch.Tensor, low: torch.Tensor, references: list[torch.Tensor] | None = None
    ) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Measures one original.

        Args:
            high: (1, 3, H, W) in [0, 1].
            low: (1, 3, H / 4, W / 4), multiples of 1/255 in [0, 1].
            references: full-precision outputs from elsewhere, one for each alignment, for when no model here is the reference.

        Yields:
            Each method's name with what it made of the picture, (1, 3, H, W) for each alignment; one for "bicubic".
        """
        bicubic = as_bytes(resize(low, high.shape[-2:]))
        self._measure(Row("bicubic", "bicubic", None), bicubic, high)
        yield "bicubic", [bicubic]
        for candidate in self.candidates:
            network = candidate.pipeline.network()
            outputs, seconds = upscale(candidate.pipeline, network, low, self.color_fixes, self.tile_size)
            compared = None if candidate is self.reference else references
            for index, (color_fix, output) in enumerate(zip(self.color_fixes, outputs, strict=True)):
                row = Row(candidate.name, "model", color_fix, candidate.full_precision)
                distances = {} if compared is None else self._distances(output, bicubic, compared[index])
                self._measure(row, output, high, seconds=seconds, **distances)
            if candidate is self.reference:
                references = outputs
            yield candidate.name, outputs
            if self.bypass and candidate.full_precision:
                self._measure_parts(candidate, network, low, high)

    def _measure_parts(self, candidate: Candidate, network: OneStepNetwork, low: torch.Tensor, high: torch.Tensor) -> None:
        outputs, _ = upscale(candidate.pipeline, Bypassed.of(network), low, self.color_fixes, self.tile_size)
        for color_fix, output in zip(self.color_fixes, outputs, strict=True):
            self._measure(Row(f"{candidate.name}, UNet bypassed", "bypass", color_fix, True), output, high)
        output = reconstruct(network, high, candidate.pipeline.multiple)
        self._measure(Row(f"{candidate.name}, autoencoder on the original", "autoencoder", None, True), output, high)

    def _distances(self, output: torch.Tensor, bicubic: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """How far an output, and bicubic, are from the full-precision output."""
        further = {
            f"{name}_to_full_precision": metric(output, reference)
            for name, metric in self.metrics.items()
            if getattr(metric, "needs_reference", False)
        }
        return {
            "psnr_y_to_full_precision": psnr_y(output, reference),
            "ssim_y_to_full_precision": ssim_y(output, reference),
            "bicubic_to_full_precision": psnr_y(bicubic, reference),
        } | further

    def _measure(self, row: Row, output: torch.Tensor, high: torch.Tensor, **values: float) -> None:
        row = self.rows.setdefault((row.name, row.kind, row.color_fix), row)
        further = {name: metric(output, high) for name, metric in self.metrics.items()}
        row.add(psnr_y=psnr_y(output, high), ssim_y=ssim_y(output, high), **values, **further)


def evaluate_pipelines(
    candidates: list[Candidate],
    pairs: Sequence[ImagePair | Path],
    color_fixes: Sequence[str | None] = ("wavelet", None),
    tile_size: int | None = None,
    bypass: bool = False,
    metrics: dict[str, Metric] | None = None,
    references: dict[Path, list[torch.Tensor]] | None = None,
    made: Callable[[Path, str, torch.Tensor], None] | None = None,
    degradation: str = "bicubic",
) -> list[Row]:
    """Measures models on pictures: the rows that `qartsr_pipeline.calibration.evaluation.evaluation_report.summarize` takes.

    Args:
        candidates: full precision first, for the others to be compared with it.
        pairs: what `qartsr_pipeline.calibration.data.paired_folders.find_pairs` lists, or originals, which are degraded.
        color_fixes, tile_size, bypass, metrics: see `Evaluation`.
        references: the full-precision outputs by original, uint8, one for each alignment, kept from call to call: an empty
            dictionary is filled when the first candidate is full precision, a filled one stands in when none is.
        made: called as the work goes on with the original's path, a method's name and what it made of the picture,
            (1, 3, H, W) in [0, 1] under the first alignment; at last with "original" and the original.
        degradation: of originals; see `degraded`.

    Raises:
        ValueError: a picture that a model or a metric cannot take, by its path, or one that `references` lacks.
    """
    evaluation = Evaluation(candidates, color_fixes, tile_size, bypass, metrics or {})
    for pair in (pair if isinstance(pair, ImagePair) else ImagePair(pair) for pair in pairs):
        high, low = read_pair(pair)
        low = degraded(pair.high, high, degradation) if low is None else low
        known = _kept_outputs(references, pair.high) if references and evaluation.reference is None else None
        try:
            for name, outputs in evaluation.picture(high, low, known):
                if references is not None and evaluation.reference and name == evaluation.reference.name:
                    references[pair.high] = [(output * 255).round().byte() for output in outputs]
                if made:
                    made(pair.high, name, outputs[0])
        except ValueError as error:
            raise ValueError(f"{pair.high}: {error}") from error
        if made:
            made(pair.high, "original", high)
    return list(evaluation.rows.values())


def _kept_outputs(references: dict[Path, list[torch.Tensor]], path: Path) -> list[torch.Tensor]:
    if path not in references:
        raise ValueError(f"{path}: its full-precision output was not kept: measure full precision on the same pictures first")
    return [kept.float() / 255 for kept in references[path]]
