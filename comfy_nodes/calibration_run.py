"""Runs calibration/run.py inside ComfyUI: with progress, a cancel that can be resumed, and a checkpoint that appears whole.

A run works in models/qartsr/.runs/NAME, on the same disk as the checkpoint, which is moved out of there once it is done. Folders
that begin with a dot are never listed as models, and a restart of ComfyUI leaves them alone.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

from .interruption import interruptible_unless
from .model_folders import model_folder
from .new_checkpoint import typed_path

RUNS = ".runs"
REPORT = "report"
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

    def given(self) -> dict[str, object]:
        """Arguments of calibration/run.py by name; None for its default."""
        import folder_paths

        data = str(typed_path(self.pictures, folder_paths.get_input_directory())) if self.pictures.strip() else None
        same = {"recipe": self.recipe, "bits": self.bits, "seed": self.seed}
        return {"model": str(self.model), "data": data, "steps": self.steps or None, **same}


@dataclass(frozen=True)
class Made:
    """A finished checkpoint: the picture that compares it with full precision, and what to say of it."""

    comparison: Path
    text: str


def make_checkpoint(order: Order, target: Path) -> Made:
    """Begins the run that the order describes, or goes on with it, and moves the result to `target`.

    Raises:
        InterruptProcessingException: cancelled; what was done is kept for the next time. ValueError, OSError: what
            calibration/run.py says of its arguments and data; or an unfinished run of this name has other inputs.
    """
    progress, working = StepProgress(), model_folder() / RUNS / order.name
    with torch.inference_mode(False), torch.enable_grad():  # imports too: what a module makes when it is loaded is trained with
        from calibration import run as calibration

        arguments = arguments_of(order, working)
        free_memory()
        with interruptible_unless(lambda: progress.training):
            finished = calibration.run(arguments, watch=progress, preparing=progress.preparing)
    if not finished:
        logging.info("QArtSR Quantize: stopped and saved in %s; run it with the same inputs to go on", working)
        raise progress.cancelled
    return move_out(working, target)


def arguments_of(order: Order, working: Path) -> Namespace:
    """What calibration/run.py takes, to begin the run in `working`, or to continue it.

    Raises:
        ValueError: the run there has other inputs. CheckpointError: there is no such folder of pictures.
    """
    from calibration import run as calibration

    given = order.given()
    if (working / calibration.STATE_NAME).exists():
        before = json.loads((working / calibration.ARGUMENTS_NAME).read_text(encoding="utf-8"))
        check_same(given, before, working)
    else:
        shutil.rmtree(working, ignore_errors=True)  # it ended before anything was saved
    options = [
        text for name, value in given.items() if name != "model" and value is not None for text in (f"--{name}", str(value))
    ]
    resume = ["--resume"] if working.exists() else []
    return calibration.parse([given["model"], *options, "--output", str(working), "--device", calibration_device(), *resume])


def check_same(given: dict[str, object], before: dict[str, object], working: Path) -> None:
    """Raises ValueError if an unfinished run, begun with `before`, would be continued with other inputs.

    Of the model, the folder's name is compared: the folder above may have moved, and the run itself compares the weights.
    """
    moved = Path(str(before.get("model"))).name == Path(str(given["model"])).name
    differing = [name for name, value in given.items() if before.get(name) != value and not (name == "model" and moved)]
    other = [f"{name} was {'left empty' if before.get(name) is None else before[name]}" for name in differing]
    if other:
        raise ValueError(
            f"An unfinished run has the name {working.name!r}, with other inputs: {', '.join(other)}. Give the same inputs to"
            f" go on with it, choose another name, or delete {working} to begin anew."
        )


def calibration_device() -> str:
    """Where ComfyUI computes, or the processor, where that is no device that can be calibrated on."""
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
    model = working / "model"
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
    """Shows on the node how far a run is: the parts of its preparation one after another, said below the node's inputs, then its
    steps. A cancel during the steps stops the run after the step, so that it is saved.
    """

    def __init__(self):
        from comfy.utils import ProgressBar

        self.bar, self.training = ProgressBar(1), False
        self.cancelled: Exception | None = None

    def preparing(self, doing: str, done: int, total: int) -> None:
        """Raises InterruptProcessingException once the user cancels."""
        say_on_node(f"{doing}: {done} of {total}")
        self.bar.update_absolute(done, total)

    def __call__(self, done: int, total: int) -> bool:
        from comfy.model_management import InterruptProcessingException

        if not self.training:
            say_on_node("train")
        self.training = done < total
        try:
            self.bar.update_absolute(done, total)
        except InterruptProcessingException as cancelled:
            self.cancelled = cancelled
        return self.cancelled is not None


def say_on_node(text: str) -> None:
    """A line of text on the node that is running; nowhere if nothing runs, or this ComfyUI cannot."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    context, server = get_executing_context(), getattr(PromptServer, "instance", None)
    if context is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, context.node_id)
