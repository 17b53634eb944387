"""Runs models over originals and measures what they make of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.degradations import as_bytes
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN, Metric
from qartsr_pipeline.calibration.evaluation.originals import Original
from qartsr_pipeline.calibration.evaluation.peers import FinishedOutputs, Peer
from qartsr_pipeline.calibration.evaluation.rows import SECONDS, TO_FULL_PRECISION, EvaluationRow, RowKey, make_rows
from qartsr_pipeline.image.conversion import ImageTensors
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.image.resize import enlarged_size, pad_to_multiple, resize
from qartsr_pipeline.image.tiles import MINIMUM_SIDE
from qartsr_pipeline.one_step import OneStepNetwork, Settings, finish, run_tiles
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import DeployedLayer

BICUBIC, ORIGINAL = "bicubic", "original"  # beside the models' names, in `ImageOutputs.outputs`
COLOR_FIXES = ("wavelet", None)  # the pipeline's default, and the network's own colours

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A loaded model and its name in tables.

    Attributes:
        full_precision: no layer is quantized, neither deployed nor in simulation.
    """

    name: str
    pipeline: QArtSRPipeline
    full_precision: bool

    @classmethod
    def of(cls, name: str, pipeline: QArtSRPipeline) -> Candidate:
        """Finds out whether the model is in full precision.

        Raises:
            ValueError: it enlarges by another factor than 4.
        """
        scale = pipeline.config["scale"]
        if scale != SCALE:
            raise ValueError(f"{name} enlarges {scale} times; the evaluation is for models that enlarge {SCALE} times")
        layers = [layer for model in (pipeline.unet, pipeline.vae) for layer in model.modules()]
        return cls(name, pipeline, not any(isinstance(layer, (CalibratingMixin, DeployedLayer)) for layer in layers))


@dataclass(frozen=True)
class ImageOutputs:
    """What became of one original.

    Attributes:
        label: of the original: its path, or "image 1" for one that was given in memory.
        low: (1, 3, H / 4, W / 4) float32 in [0, 1].
        outputs: method -> (1, 3, H, W) float32 in [0, 1] under the first colour alignment: "bicubic", the peers, the models, and
            "original" where there is ground truth.
    """

    label: str
    low: torch.Tensor
    outputs: Mapping[str, torch.Tensor]


@dataclass
class Evaluation:
    """Measures models on originals.

    Attributes:
        candidates: the models. When the first one is in full precision, the others are compared with it.
        metrics: by name. Those that need a reference are measured against the ground truth, where there is one, and also between
            an output and the full-precision output.
        peers: other upscalers, by the names of their rows.
        color_fixes: alignments to measure, in the order of the rows; None is none.
        tile_size: side of the tiles in pixels of the output; None for whole images.
        bypass: also measure full-precision models without their UNet, and their autoencoder on the original.
        degradation: of originals that come alone; a name in `DEGRADATIONS`.
        references: full-precision outputs by the original's label, uint8, one for each alignment, kept from one evaluation to
            the next: filled when the first candidate is in full precision, used when it is not and there are some.
        progress: called with an original's label, and how many of how many enlargements are done.
        on_image: called when all models are through with an original.
    """

    candidates: Sequence[Candidate]
    metrics: Mapping[str, Metric] = field(default_factory=lambda: dict(BUILT_IN))
    color_fixes: Sequence[str | None] = COLOR_FIXES
    tile_size: int | None = None
    bypass: bool = False
    degradation: str = "bicubic"
    peers: Mapping[str, Peer] = field(default_factory=dict)
    references: dict[str, list[torch.Tensor]] | None = None
    progress: Progress | None = None
    on_image: Callable[[ImageOutputs], None] | None = None
    _measured: dict[RowKey, dict[str, list[float]]] = field(default_factory=dict, init=False)

    @property
    def reference(self) -> Candidate | None:
        """The first model if it is in full precision."""
        return self.candidates[0] if self.candidates and self.candidates[0].full_precision else None

    def run(self, originals: Sequence[Original]) -> list[EvaluationRow]:
        """Measures all models on all originals: a row for bicubic, for each peer, then for each model and alignment.

        Raises:
            ValueError: a model or a metric cannot take an image, an output is not finite or, of a peer, of another size, or
                `references` lacks one; the message names the image.
            FileNotFoundError: a peer's output is missing.
        """
        self._measured = {}
        done, total = 0, len(originals) * (1 + len(self.peers) + len(self.candidates))
        for original in originals:
            high, low = original.read(self.degradation)
            outputs: dict[str, torch.Tensor] = {}
            try:
                for name, made in self._image(original, high, low):
                    outputs[name] = made[0]
                    done += 1
                    if self.progress:
                        self.progress(original.label, done, total)
            except ValueError as error:
                raise ValueError(f"{original.label}: {error}") from error
            if self.on_image:
                self.on_image(ImageOutputs(original.label, low, outputs if high is None else outputs | {ORIGINAL: high}))
        return make_rows(self._measured, len(originals))

    @torch.no_grad()
    def _image(
        self, original: Original, high: torch.Tensor | None, low: torch.Tensor
    ) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Measures one original (1, 3, H, W).

        Yields:
            Each method's name with what it made of the image, (1, 3, H, W) for each alignment; one for "bicubic" and for peers.
        """
        height, width = (SCALE * side for side in low.shape[-2:])
        bicubic = as_bytes(resize(low, (height, width)))
        self._measure(RowKey(BICUBIC, "bicubic"), bicubic, high)
        yield BICUBIC, [bicubic]
        for name, peer in self.peers.items():
            output, seconds = peer_output(name, peer, original, low)
            self._measure(RowKey(name, "peer"), output, high, {} if seconds is None else {SECONDS: seconds})
            yield name, [output]
        references = self._kept_outputs(original.label)
        for candidate in self.candidates:
            network = candidate.pipeline.network()
            outputs, seconds = upscale(candidate.pipeline, network, low, self.color_fixes, self.tile_size)
            compared = None if candidate is self.reference else references
            for index, (color_fix, output) in enumerate(zip(self.color_fixes, outputs, strict=True)):
                distances = {} if compared is None else self._distances(output, bicubic, compared[index])
                key = RowKey(candidate.name, "model", color_fix, candidate.full_precision)
                self._measure(key, output, high, {SECONDS: seconds} | distances)
            if candidate is self.reference:
                references = outputs
                if self.references is not None:
                    self.references[original.label] = [(output * 255).round().byte() for output in outputs]
            if self.bypass and candidate.full_precision and high is not None:
                self._measure_parts(candidate, network, low, high)
            yield candidate.name, outputs

    def _kept_outputs(self, label: str) -> list[torch.Tensor] | None:
        """Full-precision outputs from an earlier evaluation, where no model of this one is the reference."""
        if not self.references or self.reference is not None:
            return None
        if label not in self.references:
            raise ValueError("its full-precision output was not kept: measure full precision on the same images first")
        return [kept.float() / 255 for kept in self.references[label]]

    def _measure_parts(self, candidate: Candidate, network: OneStepNetwork, low: torch.Tensor, high: torch.Tensor) -> None:
        outputs, _ = upscale(candidate.pipeline, Bypassed.of(network), low, self.color_fixes, self.tile_size)
        for color_fix, output in zip(self.color_fixes, outputs, strict=True):
            self._measure(RowKey(f"{candidate.name}, UNet bypassed", "bypass", color_fix, True), output, high)
        output = reconstruct(network, high, candidate.pipeline.multiple)
        self._measure(RowKey(f"{candidate.name}, autoencoder on the original", "autoencoder", None, True), output, high)

    def _distances(self, output: torch.Tensor, bicubic: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
        """How far an output, and bicubic, are from the full-precision output."""
        compared = {name: metric for name, metric in self.metrics.items() if metric.needs_reference}
        distances = {f"{name}{TO_FULL_PRECISION}": metric(output, reference) for name, metric in compared.items()}
        if "psnr_y" in compared:
            distances[f"{BICUBIC}{TO_FULL_PRECISION}"] = psnr_y(bicubic, reference)
        return distances

    def _measure(
        self, key: RowKey, output: torch.Tensor, high: torch.Tensor | None, further: Mapping[str, float] | None = None
    ) -> None:
        if not output.isfinite().all():
            raise ValueError(f"{key.name} made values that are not finite: leave it out, or run it in float32")
        measured = {name: metric for name, metric in self.metrics.items() if high is not None or not metric.needs_reference}
        values = {name: metric(output, output if high is None else high) for name, metric in measured.items()} | dict(
            further or {}
        )
        row = self._measured.setdefault(key, {})
        for name, value in values.items():
            if math.isnan(value):
                raise ValueError(f"the metric {name!r} is undefined (NaN) for {key.name}: leave out the metric or the image")
            row.setdefault(name, []).append(value)


def peer_output(name: str, peer: Peer, original: Original, low: torch.Tensor) -> tuple[torch.Tensor, float | None]:
    """A peer's output, (1, 3, 4h, 4w) of whole 255ths, and its seconds; None for one that was finished before.

    Raises:
        ValueError: it is of another size. FileNotFoundError: it is missing.
    """
    size = (SCALE * low.shape[-2], SCALE * low.shape[-1])
    if isinstance(peer, FinishedOutputs):
        return peer.read(original, size), None
    start = time.perf_counter()
    output = peer(low)
    seconds = time.perf_counter() - start
    if tuple(output.shape) != (1, 3, *size):
        raise ValueError(f"{name} made an image of shape {tuple(output.shape)}, expected {(1, 3, *size)}")
    return as_bytes(output.float().cpu()), seconds


class Bypassed(OneStepNetwork):
    """The network without its UNet: z_H = z_L."""

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    @classmethod
    def of(cls, network: OneStepNetwork) -> Bypassed:
        return cls(**{part.name: getattr(network, part.name) for part in fields(network)})


def upscale(
    pipeline: QArtSRPipeline,
    network: OneStepNetwork,
    low: torch.Tensor,
    color_fixes: Sequence[str | None],
    tile_size: int | None,
) -> tuple[list[torch.Tensor], float]:
    """What the pipeline gives for ``low`` under each colour alignment, running the network once.

    Args:
        network: the pipeline's own, or a variation of it.
        low: (1, 3, h, w) in [0, 1].
        tile_size: None for the whole image at once, however large.

    Returns:
        One (1, 3, 4h, 4w) of whole 255ths for each alignment; the seconds that the network took.
    """
    image = ImageTensors(rgb=low)
    size = enlarged_size((image.height, image.width), SCALE)
    whole = -(-max(*size, MINIMUM_SIDE) // pipeline.multiple) * pipeline.multiple
    plan = pipeline.plan(image, tile_size or whole, None)
    settings = Settings(SCALE, SCALE, None, True, False, None, pipeline.share_tile_statistics)
    enlarged = resize(low, size)
    start = time.perf_counter()
    result = run_tiles(network, pad_to_multiple(enlarged, plan.multiple, plan.minimum), plan, settings)
    seconds = time.perf_counter() - start
    result = result[..., : size[0], : size[1]]
    outputs = [finish(image, enlarged, result, replace(settings, color_fix=color_fix)).rgb for color_fix in color_fixes]
    return [as_bytes(output) for output in outputs], seconds


def reconstruct(network: OneStepNetwork, high: torch.Tensor, multiple: int) -> torch.Tensor:
    """The original through encoder and decoder, same shape, of whole 255ths."""
    padded = pad_to_multiple(high, multiple, MINIMUM_SIDE)
    result = network.decode(network.encode(padded * 2 - 1)).float().cpu() / 2 + 0.5
    return as_bytes(result[..., : high.shape[-2], : high.shape[-1]])
