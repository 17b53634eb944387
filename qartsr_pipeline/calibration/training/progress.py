"""How a calibration tells its caller how far it is, and is asked to stop: one protocol for all of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

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
