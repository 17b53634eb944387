"""QArtSR Import: makes a folder that the nodes which load models list from a checkpoint as its authors published it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy_api.latest import io, ui

from .load_model import CATEGORY, found_by
from .model_folders import NAME_TOOLTIP, fingerprint, free_folder, remember, typed_path, wrong_name

if TYPE_CHECKING:
    from qartsr_pipeline.convert.conversion import Converted

OSEDIFF, DIFFUSERS, WAN = "osediff", "diffusers", "wan"  # the forms of `qartsr convert`
KINDS = (OSEDIFF, DIFFUSERS, WAN)
WHERE = "Absolute, or below ComfyUI's models folder."
OWN = -1  # the timestep that models of a kind are usually trained at

# Where ComfyUI keeps what an input names, if only the name of a file is given.
BASES, AUTOENCODERS, ADAPTERS = ("diffusion_models", "checkpoints", "diffusers"), ("vae",), ("loras",)


class QArtSRImport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRImport",
            display_name="QArtSR Import",
            category=CATEGORY,
            description="Makes a full-precision checkpoint in models/qartsr from published weights on this computer.",
            **found_by("import model", "convert model", "checkpoint", "OSEDiff", "WAN"),
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(KINDS),
                    default=OSEDIFF,
                    tooltip="osediff: OSEDiff's or PassionSR's checkpoint, and the base it adapts. diffusers: a one-step model"
                    " stored as a plain Stable Diffusion pipeline. wan: a one-step model for clips on WAN 2.1's transformer.",
                ),
                io.String.Input(
                    "base",
                    default="",
                    tooltip="Stable Diffusion 2.1-base: a diffusers folder, or the original .safetensors file. For diffusers: the"
                    " model itself. For wan: a diffusers folder, or the transformer's .safetensors file from"
                    f" diffusion_models. {WHERE}",
                ),
                io.String.Input("checkpoint", default="", tooltip=f"osediff.pkl or osediff.ckpt. {WHERE} Empty for the others."),
                io.String.Input("name", default="osediff", tooltip=NAME_TOOLTIP),
                io.String.Input(
                    "prompt_embedding",
                    default="",
                    tooltip=f"File with the fixed prompt's embedding, .safetensors or .pt. {WHERE} Empty: what is connected to"
                    " prompt, or the empty prompt's.",
                ),
                io.Int.Input(
                    "timestep",
                    default=OWN,
                    min=OWN,
                    max=999,
                    tooltip="What the model was trained at, for diffusers and wan. -1: 999, for wan 399. OSEDiff's is 999.",
                ),
                io.Int.Input(
                    "scale",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="The enlargement that the model was trained at, for diffusers and wan. OSEDiff's is 4.",
                ),
                io.String.Input(
                    "vae",
                    default="",
                    optional=True,
                    tooltip=f"For wan: the autoencoder as a file, such as wan_2.1_vae.safetensors. {WHERE} Empty: that of the"
                    " diffusers folder.",
                ),
                io.String.Input(
                    "lora",
                    default="",
                    optional=True,
                    tooltip=f"For wan: adapters of the transformer to merge, .safetensors. {WHERE}",
                ),
                io.Conditioning.Input(
                    "prompt",
                    optional=True,
                    tooltip="The fixed prompt, from CLIP Text Encode with the model's own text encoder, in place of the file"
                    " prompt_embedding.",
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
        cls,
        kind: str,
        base: str,
        checkpoint: str,
        name: str,
        prompt_embedding: str,
        timestep: int,
        scale: int,
        vae: str = "",
        lora: str = "",
        prompt: Any = None,
    ) -> io.NodeOutput:
        from qartsr_pipeline.convert.conversion import convert_diffusers, convert_osediff

        folder = free_folder(name)
        problem = what_to_give(kind, base, checkpoint) or what_does_not_fit(kind, vae, lora, prompt_embedding, prompt)
        if problem:
            raise ValueError(problem)
        source = on_disk(base, *BASES)
        trained = {"scale": scale} | ({} if timestep == OWN else {"timestep": timestep})
        with torch.inference_mode(False):
            embedding = on_disk(prompt_embedding) if prompt_embedding.strip() else embedding_of(prompt)
            if kind == OSEDIFF:
                converted = convert_osediff(source, on_disk(checkpoint), folder, embedding, Progress(4))
            elif kind == DIFFUSERS:
                converted = convert_diffusers(source, folder, embedding, progress=Progress(2), **trained)
            else:
                converted = import_wan(source, folder, vae, lora, embedding, trained)
        remember(folder)
        text = describe(converted, "QArtSR Load Video Model" if kind == WAN else "QArtSR Load Model")
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def import_wan(
    base: Path, folder: Path, vae: str, lora: str, embedding: Path | torch.Tensor | None, trained: dict[str, int]
) -> Converted:
    """A model for clips. What a single file lacks is said in the node's own words.

    Raises:
        CheckpointError, OSError: see `convert_wan`. ValueError: a file that is needed was not given.
    """
    from qartsr_pipeline.convert.wan import convert_wan

    if base.is_file() and not vae.strip():
        raise ValueError(f"{base.name} holds a transformer alone: give WAN's autoencoder as vae, too.")
    if base.is_file() and embedding is None:
        raise ValueError(
            f"{base.name} holds no prompt: connect CLIP Text Encode, with WAN's text encoder and the prompt that the model was"
            " trained with, to prompt; or give a file as prompt_embedding."
        )
    autoencoder = on_disk(vae, *AUTOENCODERS) if vae.strip() else None
    adapters = on_disk(lora, *ADAPTERS) if lora.strip() else None
    return convert_wan(base, folder, autoencoder, adapters, embedding, progress=Progress(3 if adapters else 2), **trained)


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
        what = "WAN's folder, or of its transformer's" if kind == WAN else "Stable Diffusion's folder or"
        return f"base is empty: give the path of {what} .safetensors file."
    if kind == OSEDIFF and checkpoint is not None and not checkpoint.strip():
        return "checkpoint is empty: give the path of osediff.pkl, or choose diffusers if there is nothing to merge."
    if kind in (DIFFUSERS, WAN) and checkpoint and checkpoint.strip():
        return f"checkpoint is for osediff alone, and kind is {kind}: leave it empty, or choose osediff."
    return None


def what_does_not_fit(kind: str, vae: str, lora: str, prompt_embedding: str, prompt: Any) -> str | None:
    """The message if something is given that this kind does not use, or the prompt twice; otherwise None."""
    given = [name for name, value in (("vae", vae), ("lora", lora)) if value.strip()]
    if kind != WAN and given:
        return f"{given[0]} is for wan alone, and kind is {kind}: leave it empty, or choose wan."
    if prompt_embedding.strip() and prompt is not None:
        return "the prompt is given twice: leave prompt_embedding empty, or take the connection from prompt."
    return None


def on_disk(path: str, *kinds: str) -> Path:
    """The path of a file or folder that the user named; nothing is downloaded.

    Args:
        kinds: of ComfyUI's model folders, in which a file may be found by its name.
    """
    import folder_paths

    found = (folder_paths.get_full_path(kind, path.strip()) for kind in kinds)
    return Path(next(filter(None, found), None) or typed_path(path, folder_paths.models_dir))


def embedding_of(prompt: Any) -> torch.Tensor | None:
    """(1, tokens, dim) of a CONDITIONING connection, None without one.

    Raises:
        ValueError: it has several parts.
    """
    if prompt is None:
        return None
    if len(prompt) != 1:
        raise ValueError(f"prompt has {len(prompt)} parts: connect one CLIP Text Encode, without nodes that combine prompts.")
    return prompt[0][0].clone()


def describe(converted: Converted, loader: str) -> str:
    """Several lines that say what was merged and written, and which node loads it."""
    lines = []
    for component, merged in converted.merged.items():
        replaced = f", {len(merged.replaced)} tensors replaced" if merged.replaced else ""
        lines.append(f"{component}: adapters of {merged.layers} layers merged{replaced}")
    return "\n".join(
        [
            *lines,
            f"written: {converted.folder} ({converted.size / 1e9:.3f} GB, full precision)",
            f"Press R, and choose {converted.folder.name} in {loader}.",
        ]
    )
