"""QArtSR Load Model, which loads a checkpoint by its name or its id on the Hub, and QArtSR Model Info, which describes it."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT

from .managed_model import AUTO, DTYPES, ManagedModel, UpscaleModel, load_model
from .model_folders import FOR_IMAGES, find_models, folder_of, label_of_model

CATEGORY = "QArtSR"
QArtSRModel = io.Custom("QARTSR_MODEL")

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


if TYPE_CHECKING:
    from qartsr_pipeline.quantization.report import ComponentReport


class QArtSRModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRModelInfo",
            display_name="QArtSR Model Info",
            category=CATEGORY,
            description="Shows scheme, bits, bytes and kernels of a model, and where it runs.",
            inputs=[QArtSRModel.Input("model", tooltip="From QArtSR Load Model.")],
            outputs=[io.String.Output(id="text", display_name="text", tooltip="What the node shows.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ManagedModel) -> io.NodeOutput:
        text = describe(model)
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def describe(model: ManagedModel) -> str:
    """A sentence on the model; then a total, one block for each component, and where it runs."""
    from qartsr_pipeline.overflow import compute_dtype
    from qartsr_pipeline.quantization.report import describe_model

    parts = {name: getattr(model.pipeline, name) for name in ("unet", "vae", "prompt_embedding")}
    with model.kernels():
        reports = [describe_model(name, part, model.device.type) for name, part in parts.items()]
    fields = ("packed_bytes", "prepared_bytes", "fp16_bytes")
    packed, prepared, fp16 = (sum(getattr(report, field) for report in reports) for field in fields)
    config, dtype = model.pipeline.config, str(compute_dtype(model.pipeline.vae)).removeprefix("torch.")
    known = [f"{model.name}: {label_of_model(model.folder)}".rstrip(" :"), f"x{config.scale}"]
    known.append(f"on {'the CPU' if model.device.type == 'cpu' else model.device}")
    known.append(f"about {model.seconds_per_megapixel:.2g} s for a megapixel of the result here")
    lines = [
        f"{', '.join(known)}.",
        "",
        f"timestep {config.timestep}; {packed / 1e6:.2f} MB loaded, {prepared / 1e6:.2f} MB more for the kernels;"
        f" {fp16 / 1e6:.2f} MB at 16 bits",
        *(line for report in reports for line in _component(report)),
        f"running on: {model.device}, {dtype}, kernels {model.backend}",
    ]
    return "\n".join(lines)


def _component(report: ComponentReport) -> list[str]:
    """One line on the component, and one for each kind of its quantized layers."""
    lines = [f"{report.name}: {report.bits}, {report.parameters:,} parameters, {report.packed_bytes / 1e6:.2f} MB"]
    kinds = Counter((layer.kind, layer.weight_bits, layer.activation_bits, layer.kernel) for layer in report.layers)
    for (kind, weights, activations, kernel), count in sorted(kinds.items()):
        lines.append(f"  {kind} W{weights}A{activations} x {count}: {kernel}")
    return lines
