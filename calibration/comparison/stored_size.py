"""How many bytes the quantized layers of a method take."""

from __future__ import annotations

import torch

from qartsr_pipeline.calibration.family import family_of
from qartsr_pipeline.calibration.start.other_grids import DynamicActivations, GroupedWeights, Offset
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import deployed_like


def stored_size(pipeline: QArtSRPipeline) -> dict[str, float]:
    """What all quantized layers take, with everything that is stored of them, see `stored_tensors`.

    Returns:
        "megabytes" (10^6 bytes) and "bits_a_weight" (of the layers' weights; biases do not count as weights).
    """
    layers = family_of(pipeline).layers(pipeline).values()
    size = sum(tensor.numel() * tensor.element_size() for layer in layers for tensor in stored_tensors(layer).values())
    weights = sum(layer.weight.numel() for layer in layers)
    return {"megabytes": round(size / 1e6, 4), "bits_a_weight": round(8 * size / weights, 3)}


def stored_tensors(layer: CalibratingMixin) -> dict[str, torch.Tensor]:
    """Name -> tensor on the meta device, of the shape and dtype in which a checkpoint folder stores it.

    A grid that exists in simulation only is stored nowhere; its tensors are what a folder would hold: packed codes, float32
    scales of the weights' groups (the grid is symmetric, so no zero points), the float32 offsets of its inputs, one byte for
    whether dynamic activations are unsigned, and the rest as in every deployed layer.
    """
    shape = layer.weight.shape
    tensors = dict(deployed_like(layer, layer.layer_scheme, "meta").named_buffers())
    if isinstance(layer, GroupedWeights) and "weight_scale" in tensors:
        outputs, inputs, *kernel = shape
        tensors["weight_scale"] = torch.empty((outputs, _groups(layer, inputs), *kernel), device="meta")
        tensors.pop("weight_zero_point", None)
    if isinstance(layer, DynamicActivations):
        tensors["input_offset"] = torch.empty((), device="meta")
        tensors["input_unsigned"] = torch.empty((), dtype=torch.uint8, device="meta")
        for name in ("input_scale", "input_zero_point"):
            tensors.pop(name, None)
    if isinstance(layer, Offset):
        tensors["input_offset"] = torch.empty(shape[1], device="meta")
    return tensors


def _groups(layer: GroupedWeights, inputs: int) -> int:
    return -(-inputs // layer.group_size)
