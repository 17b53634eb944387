"""What a model consists of: scheme, bits, parameters, bytes, and the kernels that its layers run on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from qartsr_pipeline.kernels import Backend, LayerSpec, choose_backend
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.diffusers_quantizer import attached_scheme
from qartsr_pipeline.quantization.fold import FoldedConstant
from qartsr_pipeline.quantization.fold_wan import FoldedCrossAttention


def kernel_summary(*models: nn.Module, device: str) -> str:
    """Which kernels compute how many layers of these models, such as "118 layers onednn, 2 float"; "" if none is quantized.

    Args:
        device: the type of device that the models run on, "cpu" or "cuda".
    """
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, DeployedLayer)]
    counted = Counter(choose_backend(layer.spec, device).name for layer in layers).most_common()
    parts = [f"{count} {name}" for name, count in counted]
    if counted:
        name, count = counted[0]
        parts[0] = f"{count} {'layer' if count == 1 else 'layers'} {name}"
    return ", ".join(parts)


@dataclass(frozen=True)
class LayerReport:
    """One deployed layer.

    Attributes:
        shape: the float weight's.
        grid: of its input: "tensor", or "token" with size of the rotation and "exponents".
        packed_bytes: everything that is stored for it.
        prepared_bytes: what its kernel keeps in memory in addition, from the layer's first call on; see `kernels.low_memory`.
    """

    name: str
    kind: str
    weight_bits: int
    activation_bits: int
    grid: str
    rank: int
    shape: tuple[int, ...]
    packed_bytes: int
    prepared_bytes: int
    kernel: str

    @property
    def full_rank(self) -> int:
        """Of a branch that could be the whole layer."""
        outputs, inputs, *kernel = self.shape
        return min(outputs * math.prod(kernel), inputs)


@dataclass(frozen=True)
class ComponentReport:
    """One component of a pipeline.

    Attributes:
        bits: such as "W4A4 x 84, W8A8 x 2, folded at T = 250", or "float16" when nothing is quantized.
        parameters: of the float model; folded layers no longer count.
        packed_bytes: of all stored tensors.
        fp16_bytes: of the same parameters at 16 bits.
        prepared_bytes: of all layers.
    """

    name: str
    class_name: str
    quantized: bool
    bits: str
    parameters: int
    packed_bytes: int
    fp16_bytes: int
    prepared_bytes: int
    layers: list[LayerReport] = field(default_factory=list)


def grid_text(spec: LayerSpec) -> str:
    """See `LayerReport.grid`."""
    further = {f"rotated by {spec.rotation}": spec.rotation, "exponents": spec.exponents}
    return ", ".join([spec.grid, *(text for text, there in further.items() if there)])


def describe_layer(name: str, layer: DeployedLayer, device: str, dtype: torch.dtype) -> LayerReport:
    """Report of one layer of a model in this dtype; arguments as in `describe_model`."""
    spec, kernel = layer.spec, choose_backend(layer.spec, device)
    taps = spec.kernel_size if spec.kind == "conv2d" else ()
    return LayerReport(
        name,
        spec.kind,
        spec.weight_bits,
        spec.activation_bits,
        grid_text(spec),
        spec.rank,
        (spec.out_channels, spec.in_channels, *taps),
        layer.packed_bytes,
        prepared_bytes(layer, kernel, device, dtype),
        kernel.name,
    )


def prepared_bytes(layer: DeployedLayer, kernel: Backend, device: str, dtype: torch.dtype) -> int:
    """Bytes that the kernel keeps for the layer, in addition to what is stored, once it was called with inputs of this dtype.

    Tried out on a copy of the layer.
    """
    if not layer.prepared.keeps:
        return 0
    trial = type(layer)(layer.spec, layer.bias is not None, "meta")
    for name, buffer in layer.named_buffers():
        trial.register_buffer(name, buffer.to(device))
    kernel.prepare(trial, dtype)
    return trial.prepared.bytes


def _dtype(model: nn.Module) -> torch.dtype:
    """Models of diffusers and of transformers have this property."""
    return cast(torch.dtype, model.dtype)


def _bits(model: nn.Module, layers: list[LayerReport]) -> str:
    if not layers:
        return str(_dtype(model)).removeprefix("torch.")
    token = {layer: " per token" if layer.grid != "tensor" else "" for layer in layers}
    counted = Counter(f"W{layer.weight_bits}A{layer.activation_bits}{token[layer]}" for layer in layers)
    parts = [f"{bits} x {count}" for bits, count in counted.most_common()]
    wide = sum(layer.rank >= layer.full_rank > 0 for layer in layers)
    parts += [f"{wide} with a branch of full rank"] if wide else []  # such a branch could be the whole layer, in 16 bits
    scheme = attached_scheme(model)
    folding = scheme.folding if scheme else None
    return ", ".join(parts + ([f"folded at T = {folding.timestep}"] if folding else []))


def describe_model(name: str, model: nn.Module, device: str = "cpu") -> ComponentReport:
    """Report of one component of a pipeline, a model of diffusers or of transformers.

    Args:
        device: the type of device that kernels are chosen for.
    """
    deployed = {n: m for n, m in model.named_modules() if isinstance(m, DeployedLayer)}
    inside = {id(t) for layer in deployed.values() for t in layer.buffers()}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in inside]
    layers = [describe_layer(n, m, device, _dtype(model)) for n, m in deployed.items()]
    parameters = sum(m.weight_count for m in deployed.values()) + sum(p.numel() for p in model.parameters())
    folded = (m for m in model.modules() if isinstance(m, (FoldedConstant, FoldedCrossAttention)))
    constants = sum(buffer.numel() for m in folded for buffer in m.buffers(recurse=False))
    packed = sum(layer.packed_bytes for layer in layers) + sum(t.numel() * t.element_size() for t in rest)
    fp16, prepared = 2 * (parameters + constants), sum(layer.prepared_bytes for layer in layers)
    bits = _bits(model, layers)
    return ComponentReport(name, type(model).__name__, bool(layers), bits, parameters, packed, fp16, prepared, layers)
