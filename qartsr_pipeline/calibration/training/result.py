"""What a calibration leaves beside the quantized pipeline itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from qartsr_pipeline.quantization.scheme import QuantizationScheme


class TurnRecord(TypedDict):
    """One module's turn: loss of its first and of its last step."""

    stage: str
    module: str
    first: float
    last: float


class Histogram(TypedDict):
    """Of a layer's smoothed input: n counts between n + 1 edges, and the input bounds."""

    counts: list[int]
    edges: list[float]
    lower: float
    upper: float


@dataclass
class Calibrated:
    """The result of a calibration.

    Attributes:
        schemes: component -> scheme, to freeze with.
        losses: stage -> loss of every step.
        turns: of every module that was trained by itself.
        errors_before, layer_errors: "component.layer" -> relative squared error of the layer's output alone on calibration
            inputs, |y_q - y|^2 / |y|^2, before and after training.
        histograms: "component.layer" -> histogram of its input.
        weights: SHA-256 of the original weights, the same before and after.
        start: what is recorded of the run that it started from.
        stopped: whether it was asked to stop before the end.
    """

    schemes: dict[str, QuantizationScheme]
    losses: dict[str, list[float]] = field(default_factory=dict)
    turns: list[TurnRecord] = field(default_factory=list)
    errors_before: dict[str, float] = field(default_factory=dict)
    layer_errors: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    weights: str = ""
    start: dict[str, Any] | None = None
    stopped: bool = False
