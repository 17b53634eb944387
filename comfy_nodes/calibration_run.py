"""Runs `qartsr_pipeline.quantize` in ComfyUI: with progress, a cancel that can be resumed, and a checkpoint that appears whole.

A run works in models/qartsr/.runs/NAME, on the same disk as the checkpoint, which is moved out of there once it is done. Folders
that begin with a dot are never listed as models, and a restart of ComfyUI leaves them alone.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .model_folders import model_folder, typed_path
from .progress import interruptible_unless

RUNS = ".runs"
SAY_EVERY = 1.0  # seconds between lines on the node
SHOWN = "pictures-1.png"  # the first comparison of the report


@dataclass(frozen=True)
class Order:
    """What is to be made, as the node's inputs say it; `model` is the folder."""

    model: Path
    pictures: str
    recipe: str
    bits: str
    steps: int
    seed: int
    name: str

    @property
    def data(self) -> str | None:
        """The folder of images to calibrate on, None for procedural ones.

        Raises:
            CheckpointError: there is no such folder.
        """
        import folder_paths

        return str(typed_path(self.pictures, folder_paths.get_input_directory())) if self.pictures.strip() else None


@dataclass(frozen=True)
class Made:
    """A finished checkpoint: the image that compares it with full precision, and what to say of it."""

    comparison: Path
    text: str


def make_checkpoint(order: Order, target: Path) -> Made:
    """Begins the run that the order describes, or continues it, and moves the result to `target`.

    Raises:
        InterruptProcessingException: cancelled; what was done is kept for the next time.
        ValueError, OSError: what `quantize` says of its arguments and data; or an unfinished run of this name has other inputs.
    """
    progress, working = StepProgress(), model_folder() / RUNS / order.name
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
    ):  # while importing, too: tensors made then are trained with
        from qartsr_pipeline import quantize

        data = order.data
        check_unfinished(order, data, working)
        free_memory()
        with interruptible_unless(lambda: progress.training):
            result = quantize(
                order.model,
                order.bits,
                data,
                recipe=order.recipe,
                steps=order.steps or None,
                seed=order.seed,
                output=working,
                device=calibration_device(),
                callback=progress.stepped,
                progress=progress.preparing,
            )
    if not result.finished:
        logging.info("QArtSR Quantize: stopped and saved in %s; run it with the same inputs to continue", working)
        assert progress.cancelled is not None  # nothing else stops it
        raise progress.cancelled
    return move_out(working, target)


def check_unfinished(order: Order, data: str | None, working: Path) -> None:
    """Makes sure that an unfinished run in `working` has the same inputs; removes one that ended before anything was saved.

    Of the model, the folder's name is compared: the folder above may have moved, and the run itself compares the weights.

    Raises:
        ValueError: the run there has other inputs. FolderInUseError: another process works on it.
    """
    from qartsr_pipeline.calibration.arguments import read_arguments
    from qartsr_pipeline.calibration.training.calibration_state import STATE_NAME
    from qartsr_pipeline.folder_lock import FolderLock

    before = read_arguments(working) if (working / STATE_NAME).exists() else None
    if before is None:
        if working.is_dir():
            with FolderLock(working).take():  # another ComfyUI with the same models folder may be about to save there
                shutil.rmtree(working, ignore_errors=True)
        return
    compared = {
        "model": (Path(before.model).name, order.model.name),
        "data": (before.data, data),
        "steps": (before.steps, order.steps or None),
        "recipe": (before.recipe, order.recipe),
        "bits": (before.bits, order.bits),
        "seed": (before.seed, order.seed),
    }
    other = [f"{name} was {'left empty' if was is None else was}" for name, (was, now) in compared.items() if was != now]
    if other:
        raise ValueError(
            f"An unfinished run has the name {working.name!r}, with other inputs: {', '.join(other)}. Give the same inputs to"
            f" continue it, choose another name, or delete {working} to begin anew."
        )


def calibration_device() -> str:
    """ComfyUI's device, or the CPU if calibration does not run on that one."""
    from comfy import model_management

    kind = model_management.get_torch_device().type
    return kind if kind in ("cuda", "mps") else "cpu"


def free_memory() -> None:
    """Gives the memory of all loaded models to the run; ComfyUI loads them again when they are needed."""
    from comfy import model_management

    model_management.unload_all_models()
    model_management.soft_empty_cache()


def move_out(working: Path, target: Path) -> Made:
    """The finished run's model becomes `target`, with the report inside; nothing else of the run is kept."""
    from qartsr_pipeline.calibration.carry_out import MODEL, REPORT

    model = working / MODEL
    os.replace(working / REPORT, model / REPORT)
    size = sum(file.stat().st_size for file in model.rglob("*.safetensors"))
    os.rename(model, target)
    shutil.rmtree(working, ignore_errors=True)
    text = (
        f"written: {target} ({size / 1e6:.2f} MB)\nreport: {target / REPORT / 'index.html'}\n"
        f"Press R, and choose {target.name} in QArtSR Load Model."
    )
    return Made(target / REPORT / SHOWN, text)


class StepProgress:
    """Shows on the node how far a run is: the parts of its preparation one after another, then its steps, each with the time
    that is left, said below the node's inputs. A cancel during the steps stops the run after the step, so that it is saved.
    """

    def __init__(self) -> None:
        from comfy.utils import ProgressBar

        self.bar, self.training = ProgressBar(1), False
        self.cancelled: Exception | None = None
        self._part, self._begun, self._first = "", 0.0, 0  # what runs now, since when, and how much was done by then
        self._said = -math.inf

    def preparing(self, what: str, done: int, total: int) -> None:
        """Raises InterruptProcessingException once the user cancels."""
        self._say(what, done, total)
        self.bar.update_absolute(done, total)

    def stepped(self, step: int, steps: int, loss: float) -> bool:
        """True once the user cancels."""
        from comfy.model_management import InterruptProcessingException

        self._say("train", step, steps)
        self.training = step < steps
        try:
            self.bar.update_absolute(step, steps)
        except InterruptProcessingException as cancelled:
            self.cancelled = cancelled
        return self.cancelled is not None

    def _say(self, part: str, done: int, total: int) -> None:
        now = time.monotonic()
        if part != self._part:
            self._part, self._begun, self._first, self._said = part, now, done, -math.inf
        if now - self._said < SAY_EVERY and done < total:
            return
        self._said = now
        made = done - self._first
        left = (now - self._begun) / made * (total - done) if made else 0.0
        say_on_node(f"{part}: {done} of {total}{f', about {duration(left)} left' if left >= 1 else ''}")


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def say_on_node(text: str) -> None:
    """A line of text on the node that is running; nowhere if nothing runs, or this ComfyUI cannot."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, context.node_id)
