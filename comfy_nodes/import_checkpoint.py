"""QArtSR Import: makes a folder that QArtSR Load Model lists from a checkpoint as its authors published it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from comfy_api.latest import io, ui

from .load_model import CATEGORY
from .model_folders import NAME_TOOLTIP, fingerprint, free_folder, remember, typed_path, wrong_name

if TYPE_CHECKING:
    from qartsr_pipeline.convert.conversion import Converted

OSEDIFF, DIFFUSERS = "osediff", "diffusers"  # the forms of `qartsr convert`
KINDS = (OSEDIFF, DIFFUSERS)
WHERE = "Absolute, or below ComfyUI's models folder."


class QArtSRImport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRImport",
            display_name="QArtSR Import",
            category=CATEGORY,
            description="Makes a full-precision checkpoint in models/qartsr from published weights on this computer.",
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=OSEDIFF,
                    tooltip="osediff: OSEDiff's or PassionSR's checkpoint, and the base it adapts. diffusers: a one-step model"
                    " stored as a plain Stable Diffusion pipeline.",
                ),
                io.String.Input(
                    "base",
                    default="",
                    tooltip="Stable Diffusion 2.1-base: a diffusers folder, or the original .safetensors file. For diffusers: the"
                    f" model itself. {WHERE}",
                ),
                io.String.Input("checkpoint", default="", tooltip=f"osediff.pkl or osediff.ckpt. {WHERE} Empty for diffusers."),
                io.String.Input("name", default="osediff", tooltip=NAME_TOOLTIP),
                io.String.Input(
                    "prompt_embedding",
                    default="",
                    tooltip=f"File with the fixed prompt's embedding, .safetensors or .pt. {WHERE} Empty: the empty prompt's.",
                ),
                io.Int.Input(
                    "timestep",
                    default=999,
                    min=0,
                    max=999,
                    tooltip="What the model was trained at. Only matters for diffusers; OSEDiff's is 999.",
                ),
                io.Int.Input(
                    "scale",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="The enlargement that the model was trained at. Only matters for diffusers; OSEDiff's is 4.",
                ),
            ],
            outputs=[io.String.Output(id="text", display_name="text", tooltip="What was written, as the node shows it.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(
        cls, kind: str | None = None, base: str | None = None, checkpoint: str | None = None, name: str | None = None
    ) -> bool | str:
        """True, or what is wrong, before anything runs. Connected and missing inputs are None here."""
        if kind is not None and kind not in KINDS:
            return f"kind {kind!r} is none of {', '.join(KINDS)}."
        return what_to_give(kind, base, checkpoint) or (True if name is None else wrong_name(name) or True)

    @classmethod
    def fingerprint_inputs(cls, name: str | None = None, **others: object) -> int:
        """Changes when the checkpoint was deleted."""
        return fingerprint(name)

    @classmethod
    def execute(
        cls, kind: str, base: str, checkpoint: str, name: str, prompt_embedding: str, timestep: int, scale: int
    ) -> io.NodeOutput:
        from qartsr_pipeline.convert.conversion import convert_diffusers, convert_osediff

        folder = free_folder(name)
        problem = what_to_give(kind, base, checkpoint)
        if problem:
            raise ValueError(problem)
        source, embedding = on_disk(base), on_disk(prompt_embedding) if prompt_embedding.strip() else None
        with torch.inference_mode(False):
            if kind == OSEDIFF:
                converted = convert_osediff(source, on_disk(checkpoint), folder, embedding, Progress(4))
            else:
                converted = convert_diffusers(source, folder, embedding, timestep, scale, Progress(2))
        remember(folder)
        text = describe(converted)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


class Progress:
    """Progress callback of a conversion: moves the node's bar, and raises between steps once the user cancels."""

    def __init__(self, steps: int):
        from comfy.utils import ProgressBar

        self.bar, self.steps, self.begun = ProgressBar(steps), steps, 0

    def __call__(self, step: str) -> None:
        from comfy.model_management import throw_exception_if_processing_interrupted

        throw_exception_if_processing_interrupted()
        self.bar.update_absolute(self.begun, self.steps)
        self.begun += 1


def what_to_give(kind: str | None, base: str | None, checkpoint: str | None) -> str | None:
    """The message if a path that this kind needs is empty, or one that it does not use is given; otherwise None."""
    if base is not None and not base.strip():
        return "base is empty: give the path of Stable Diffusion's folder or .safetensors file."
    if kind == OSEDIFF and checkpoint is not None and not checkpoint.strip():
        return "checkpoint is empty: give the path of osediff.pkl, or choose diffusers if there is nothing to merge."
    if kind == DIFFUSERS and checkpoint and checkpoint.strip():
        return "checkpoint is for osediff alone: leave it empty, or choose osediff to merge it into the base."
    return None


def on_disk(path: str) -> Path:
    """The path of a file or folder that the user named; nothing is downloaded."""
    import folder_paths

    return typed_path(path, folder_paths.models_dir)


def describe(converted: Converted) -> str:
    """Several lines that say what was merged and written."""
    lines = []
    for component, merged in converted.merged.items():
        replaced = f", {len(merged.replaced)} tensors replaced" if merged.replaced else ""
        lines.append(f"{component}: adapters of {merged.layers} layers merged{replaced}")
    return "\n".join(
        [
            *lines,
            f"written: {converted.folder} ({converted.size / 1e9:.3f} GB, full precision)",
            f"Press R, and choose {converted.folder.name} in QArtSR Load Model.",
        ]
    )
