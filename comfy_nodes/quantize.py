"""QArtSR Quantize: a full-precision checkpoint becomes one of fewer bits, calibrated on the user's pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image

from .load_model import CATEGORY, found_by
from .model_folders import NAME_TOOLTIP, find_models, fingerprint, free_folder, remember, wrong_name

DEFAULT_MODEL = "tiny-fp"
RECIPES = ("qartsr", "lsq", "efficientdm", "maxmin")  # those that make a checkpoint; new ones at the end
BITS = ("w8a8", "w6a6", "w4a8", "w4a4", "w3a3", "w2a2", "w8a16", "w4a16")


class QArtSRQuantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        names = full_precision_models()
        return io.Schema(
            node_id="QArtSRQuantize",
            display_name="QArtSR Quantize",
            category=CATEGORY,
            description="Makes a checkpoint of fewer bits from one in full precision, and shows the two side by side. It trains,"
            " which takes minutes to hours. Cancelled, it goes on when it is run again.",
            **found_by("quantize model", "compress model", "4 bits", "W4A4"),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=names,
                    default=DEFAULT_MODEL if DEFAULT_MODEL in names else None,
                    tooltip="A full-precision checkpoint in models/qartsr, or the small one that comes along. It stays as it is.",
                ),
                io.String.Input(
                    "pictures",
                    default="",
                    tooltip="Folder of photographs to calibrate on, of at least 256 pixels a side: absolute, or below ComfyUI's"
                    " input folder. Empty: procedural pictures, which need no data; photographs give better results.",
                ),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default=RECIPES[0],
                    tooltip="How it is quantized. qartsr: the best at few bits. maxmin: no training, done at once, for 8 bits.",
                ),
                io.Combo.Input(
                    "bits",
                    options=list(BITS),
                    default="w4a4",
                    tooltip="Of weights (w) and activations (a). 16: not quantized.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1_000_000,
                    step=50,
                    tooltip="Training steps in all; more is better, and takes longer. 0: as many as the recipe says;"
                    " maxmin trains nothing and takes no other.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Decides which parts of the pictures are taken. The same seed gives the same checkpoint.",
                ),
                io.String.Input("name", default="my-w4a4", tooltip=NAME_TOOLTIP),
            ],
            outputs=[
                io.Image.Output(
                    id="comparison",
                    display_name="comparison",
                    tooltip="The sample photograph: reduced, enlarged by bicubic resampling, by the full-precision model, by the"
                    " quantized one, and the original; below, a detail of each.",
                ),
                io.String.Output(id="text", display_name="text", tooltip="What was written."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, model: str | None = None, recipe: str | None = None, bits: str | None = None, name: str | None = None
    ) -> bool | str:
        """True, or what is wrong, before anything runs. Connected and missing inputs are None here."""
        for given, label, allowed in ((recipe, "recipe", RECIPES), (bits, "bits", BITS)):
            if given is not None and given not in allowed:
                return f"{label} {given!r} is none of {', '.join(allowed)}."
        if model is not None and model not in full_precision_models():
            return not_full_precision(model)
        return True if name is None else wrong_name(name) or True

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **others: object) -> int:
        """Changes when the checkpoint was deleted."""
        return fingerprint(name)

    @classmethod
    def execute(cls, model: str, pictures: str, recipe: str, bits: str, steps: int, seed: int, name: str) -> io.NodeOutput:
        from .calibration_run import Order, make_checkpoint

        folder = free_folder(name)
        if model not in full_precision_models():
            raise ValueError(not_full_precision(model))
        made = make_checkpoint(Order(find_models()[model], pictures, recipe, bits, steps, seed, name), folder)
        remember(folder)
        comparison = read_picture(made.comparison)
        return io.NodeOutput(comparison, made.text, ui=ui.PreviewImage(comparison, cls=cls))


def full_precision_models() -> list[str]:
    """Names of the checkpoints that can be quantized; those with a damaged component are left out."""
    from qartsr_pipeline.checkpoint_files import CheckpointError, is_quantized

    names = []
    for name, folder in find_models().items():
        try:
            names += [] if is_quantized(folder) else [name]
        except (CheckpointError, OSError):
            pass  # QArtSR Load Model lists it and says what is wrong with it
    return names


def not_full_precision(model: str) -> str:
    """The message for a model that cannot be quantized."""
    there = ", ".join(full_precision_models())
    return f"There is no full-precision model {model!r}. Choose one of {there}; the key R refreshes the list."


def read_picture(path: Path) -> torch.Tensor:
    """A PNG file as ComfyUI's IMAGE, (1, H, W, 3)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)[None]
