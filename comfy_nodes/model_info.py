"""QArtSR Model Info: what a loaded model is, and what it takes on this machine."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from comfy_api.latest import io, ui
from torch import nn

from .load_model import CATEGORY, found_by, input_for_any_model
from .managed_model import ManagedModel
from .model_folders import label_of_model

if TYPE_CHECKING:
    from qartsr_pipeline.quantization.report import ComponentReport


class QArtSRModelInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QArtSRModelInfo",
            display_name="QArtSR Model Info",
            category=CATEGORY,
            description="Shows scheme, bits, bytes and kernels of a model, for images or for clips, and where it runs.",
            **found_by("model info", "model size", "bits", "kernels"),
            inputs=[input_for_any_model()],
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

    parts = {name: part for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)}
    with model.kernels():
        reports = [describe_model(name, part, model.device.type) for name, part in parts.items()]
    fields = ("packed_bytes", "prepared_bytes", "fp16_bytes")
    packed, prepared, fp16 = (sum(getattr(report, field) for report in reports) for field in fields)
    config, dtype = model.pipeline.config, str(compute_dtype(model.pipeline.vae)).removeprefix("torch.")
    known = [f"{model.name}: {label_of_model(model.folder)}".rstrip(" :"), f"x{config.scale}"]
    known.append(f"on {'the CPU' if model.device.type == 'cpu' else model.device}")
    each = "each frame of the result" if model.for_clips else "the result"
    known.append(f"about {model.seconds_per_megapixel:.2g} s for a megapixel of {each} here")
    seen = f"chunks of {config.frames_per_chunk} frames in tiles of {config.tile_size}; " if model.for_clips else ""
    lines = [
        f"{', '.join(known)}.",
        "",
        f"timestep {config.timestep}; {seen}{packed / 1e6:.2f} MB loaded, {prepared / 1e6:.2f} MB more for the kernels;"
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
