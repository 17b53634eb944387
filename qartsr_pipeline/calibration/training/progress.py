"""Between a long run and its caller: how far it is, how it is asked to stop, and what a calibration leaves beside the model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

if TYPE_CHECKING:  # heavy, and command lines import this file
    from qartsr_pipeline.quantization.scheme import QuantizationScheme

Item = TypeVar("Item")
PreparationCallback = Callable[[str, int, int], None]
StepCallback = Callable[[int, int, float], bool | None]


@dataclass(frozen=True)
class Step:
    """A training step that was just made.

    Attributes:
        done, total: steps so far, this one included, and of the whole run.
        loss: of this step.
        place: the stage, and the module that is trained where it trains one at a time.
    """

    done: int
    total: int
    loss: float
    place: str


class Progress(Protocol):
    """What a calibration calls. An exception that one of these raises ends it."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """Before the first step: how much of ``what`` is done. Called before the first part and after every one."""

    def stepped(self, step: Step) -> bool:
        """After every step; True stops the run there, saved as after Ctrl-C."""


@dataclass(frozen=True)
class Callbacks:
    """Progress by two functions, either of which may be missing; see `qartsr_pipeline.calibration.api.quantize`."""

    on_step: StepCallback | None = None
    on_preparation: PreparationCallback | None = None

    def preparing(self, what: str, done: int, total: int) -> None:
        if self.on_preparation is not None:
            self.on_preparation(what, done, total)

    def stepped(self, step: Step) -> bool:
        return self.on_step is not None and bool(self.on_step(step.done, step.total, step.loss))


SILENT = Callbacks()


def follow(progress: Progress, items: Collection[Item], what: str) -> Iterator[Item]:
    """The items, one after another, with a report before the first and after each."""
    progress.preparing(what, 0, len(items))
    for number, item in enumerate(items, 1):
        yield item
        progress.preparing(what, number, len(items))


class TurnRecord(TypedDict):
    """One module's turn: loss of its first and of its last step. Of a layer's: error on inputs held out, before and after."""

    stage: str
    module: str
    first: float
    last: float


class LayerSensitivity(TypedDict):
    """See `training.volts`: its sensitivity, its class ("low", "medium", "high"), and the steps that it was trained for."""

    value: float
    kind: str
    steps: int


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
        sensitivities: "component.layer" -> of its input over the calibration clips, where a stage asks for it.
        curve: bits a weight and predicted error of the assignments that led to the schemes, where there was a budget.
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
    curve: list[tuple[float, float]] = field(default_factory=list)
    sensitivities: dict[str, LayerSensitivity] = field(default_factory=dict)


class Stopped(Exception):
    """A run was asked to stop, and has saved its state: starting it again continues from there."""


class StopSignals:
    """A context in which Ctrl-C and the termination signal set `requested` only; a second signal interrupts at once.

    Outside of the main thread no signal can be caught: there, set `requested` to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
