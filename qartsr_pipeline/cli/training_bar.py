"""What the training commands show: a bar with the loss, and a line for each validation."""

from __future__ import annotations

import logging
from types import TracebackType

from tqdm import tqdm

from qartsr_pipeline.calibration.training.progress import Step

LOGGER = "qartsr_pipeline.calibration.retraining"


class _AboveBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))


class TrainingBar:
    """A `Progress` that draws one bar a training run; within its context, the trainer's log lines are printed above it."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._handler = _AboveBar()

    def __enter__(self) -> TrainingBar:
        logger = logging.getLogger(LOGGER)
        logger.setLevel(logging.INFO)
        logger.addHandler(self._handler)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        logging.getLogger(LOGGER).removeHandler(self._handler)
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def preparing(self, what: str, done: int, total: int) -> None:
        """Nothing is shown: retraining has no preparation that takes long."""

    def stepped(self, step: Step) -> bool:
        """Moves the bar; another run, which begins lower or is of another length, gets a new one."""
        bar = self._bar
        if bar is None or step.total != bar.total or step.done <= bar.n:
            self._close()
            self._bar = bar = tqdm(total=step.total, initial=step.done - 1, unit="step", mininterval=5)
        bar.set_description_str(step.place, refresh=False)
        bar.set_postfix_str(f"loss {step.loss:.4g}", refresh=False)
        bar.update(step.done - bar.n)
        return False
