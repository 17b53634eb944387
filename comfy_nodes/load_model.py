"""QArtSR Load Model and QArtSR Load Video Model: load a checkpoint by its name or its id on the Hub."""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT

from .managed_model import AUTO, DTYPES, ManagedModel, UpscaleModel, load_model
from .model_folders import FOR_BOTH, FOR_CLIPS, FOR_IMAGES, class_of, find_models, folder_of, label_of_model

CATEGORY = "QArtSR"
QArtSRModel = io.Custom("QARTSR_MODEL")
QArtSRVideoModel = io.Custom("QARTSR_VIDEO_MODEL")

_unused: set[str] = set()  # values of `model` in the graph that came last, of nodes whose hub_id replaces it


def found_by(*words: str) -> dict[str, list[str]]:
    """Further words that the search box finds a node by, as an argument of its schema; none in an older ComfyUI."""
    known = {field.name for field in fields(io.Schema)}
    return {"search_aliases": list(words)} if "search_aliases" in known else {}


def advanced(declared: Any) -> Any:
    """An input that newer frontends show only on demand; older ones show it like any other."""
    declared.extra_dict = {**(declared.extra_dict or {}), "advanced": True}
    return declared


@lru_cache(maxsize=1)
def available_backends() -> tuple[str, ...]:
    """The kernel backends that this machine can use; the reasons for the others are logged, once."""
    from qartsr_pipeline.kernels import list_backends

    backends = list_backends()
    for name, reason in backends.items():
        if reason is not None:
            logging.info("QArtSR: the kernel backend %s is not available: %s", name, reason)
    return tuple(name for name, reason in backends.items() if reason is None)


def loading_inputs(labels: dict[str, str], default: str, tooltip: str) -> list[Any]:
    """The inputs of a node that loads a model.

    Args:
        labels: name -> what is shown in the list; what is stored in workflows stays the name.
    """
    model = io.Combo.Input("model", options=list(labels), default=default if default in labels else None, tooltip=tooltip)
    model.extra_dict = {"qartsr_labels": labels}  # for web/model_list.js
    return [
        model,
        io.String.Input(
            "hub_id",
            default="",
            tooltip="Empty: the model chosen above. Or the name of a repository on the Hugging Face Hub, owner/name: it"
            " is downloaded into models/qartsr once, and used from there afterwards.",
        ),
        advanced(
            io.Combo.Input(
                "backend",
                options=[AUTO, *available_backends()],
                default=AUTO,
                tooltip="How models of few bits are computed. auto: the fastest way of this machine. The log says why"
                " others are not available.",
            )
        ),
        advanced(
            io.Combo.Input(
                "dtype",
                options=list(DTYPES),
                default=AUTO,
                tooltip="Number format of what is not quantized. auto: bfloat16 or float16 on a GPU, bfloat16 on a"
                " CPU that computes faster in it, otherwise float32.",
            )
        ),
    ]


def input_for_any_model() -> Any:
    """The input `model` of nodes that take models for clips and for images."""
    return io.MultiType.Input(
        "model", types=[QArtSRVideoModel, QArtSRModel], tooltip="From QArtSR Load Video Model, or QArtSR Load Model."
    )


class LoadingNode(io.ComfyNode):
    """What the nodes that load a model have in common. ComfyUI keeps a schema with its class, so none derives from another."""

    classes: tuple[str, ...]  # of the models in the list

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        """True, or what is wrong, before anything runs. A connected or missing input is None here.

        ComfyUI repeats the message for every input that this takes: so it is the model alone, `execute` checks the others, and
        `remember_hub_models` tells what `hub_id` is for.
        """
        if model is not None and model not in _unused:
            try:
                folder_of(model, cls.classes)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, model: str | None = None, hub_id: str | None = None, **others: str | None) -> Any:
        """Changes when the model's files do, so that the model is loaded anew. Connected inputs are None here."""
        if hub_id and hub_id.strip():
            return hub_id.strip()
        folder = find_models(cls.classes).get(model)
        return _fingerprint(folder) if folder else None

    @classmethod
    def load(cls, model: str, hub_id: str, backend: str, dtype: str) -> ManagedModel:
        """The model; raises ValueError if one of the values does not exist, or it is of another class."""
        from .download import download_once

        if backend not in (AUTO, *available_backends()):
            raise ValueError(
                f"There is no kernel backend {backend!r} on this machine. Choose {AUTO}; the log says why others are missing."
            )
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}.")
        hub_id = hub_id.strip()
        name, folder = (hub_id, download_once(hub_id)) if hub_id else (model, folder_of(model, cls.classes))
        return load_model(name, folder, backend, dtype, cls.classes)


class QArtSRLoadModel(LoadingNode):
    classes = FOR_IMAGES

    @classmethod
    def define_schema(cls) -> io.Schema:
        labels = {name: label_of_model(folder) for name, folder in find_models(cls.classes).items()}
        return io.Schema(
            node_id="QArtSRLoadModel",
            display_name="QArtSR Load Model",
            category=CATEGORY,
            description="Loads a super-resolution model. Small ones are included; put others into models/qartsr.",
            **found_by("upscale model", "super resolution model"),
            inputs=loading_inputs(
                labels,
                DEFAULT_CHECKPOINT,
                "A checkpoint folder in models/qartsr, or one of the models that are included. The list says what each is for;"
                " photo-w4a4 suits most images.",
            ),
            outputs=[
                QArtSRModel.Output(id="loaded_model", display_name="model", tooltip="For QArtSR Upscale and QArtSR Model Info."),
                io.Custom("UPSCALE_MODEL").Output(
                    id="upscale_model",
                    display_name="upscale_model",
                    tooltip="For other nodes that enlarge with a model, such as Upscale Image (using Model) and Ultimate SD"
                    " Upscale. They cut tiles themselves; QArtSR Upscale hides tile borders better.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: str, hub_id: str, backend: str, dtype: str) -> io.NodeOutput:
        loaded = cls.load(model, hub_id, backend, dtype)
        return io.NodeOutput(loaded, UpscaleModel(loaded))


class QArtSRLoadVideoModel(LoadingNode):
    classes = FOR_BOTH

    @classmethod
    def define_schema(cls) -> io.Schema:
        labels = {}
        for name, folder in find_models(cls.classes).items():
            kind = "for clips" if class_of(folder) in FOR_CLIPS else "for images, frame by frame"
            labels[name] = ", ".join(filter(None, (kind, label_of_model(folder))))
        best = next((name for name in labels if labels[name].startswith("for clips")), DEFAULT_CHECKPOINT)
        return io.Schema(
            node_id="QArtSRLoadVideoModel",
            display_name="QArtSR Load Video Model",
            category=CATEGORY,
            description="Loads a model that enlarges clips. Small ones are included; put others into models/qartsr.",
            **found_by("video upscale model", "video super resolution model"),
            inputs=loading_inputs(
                labels,
                best,
                "Models for clips come first: they see many frames at once, so detail stays steady. Models for images enlarge one"
                " frame after another, and their finest detail may flicker.",
            ),
            outputs=[
                QArtSRVideoModel.Output(
                    id="video_model",
                    display_name="model",
                    tooltip="For QArtSR Video Upscale, QArtSR Video Frames and QArtSR Model Info.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: str, hub_id: str, backend: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(cls.load(model, hub_id, backend, dtype))


def remember_hub_models(request: dict) -> dict:
    """Called by ComfyUI with each graph that is about to be checked: a model that is not used need not exist."""
    _unused.clear()
    for node in (request.get("prompt") or {}).values():
        inputs = node.get("inputs", {}) if isinstance(node, dict) else {}
        hub_id, model = inputs.get("hub_id"), inputs.get("model")
        if isinstance(model, str) and (hub_id.strip() if isinstance(hub_id, str) else hub_id):
            _unused.add(model)
    return request


def _fingerprint(folder: Path) -> tuple:
    files = sorted(path for pattern in ("*.json", "*/*.json", "*/*.safetensors") for path in folder.glob(pattern))
    return (str(folder), *((path.stat().st_mtime_ns, path.stat().st_size) for path in files))
