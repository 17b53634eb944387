"""Calibration that starts from a quantized model: what a deployed layer computes becomes a calibrating layer's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from qartsr_pipeline.arithmetic.affine import code_range
from qartsr_pipeline.arithmetic.token_grid import rotated
from qartsr_pipeline.calibration.families import kind_of_folder
from qartsr_pipeline.calibration.instances import load_pipeline
from qartsr_pipeline.calibration.start.branches import set_adapter
from qartsr_pipeline.calibration.start.initialise import Initialisation, set_branch, set_input_bounds, weight_bounds
from qartsr_pipeline.calibration.start.observers import InputSample
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.kernels.reference import weight_codes
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.token_layers import TokenLinear

RECORD_NAME = "quantization.json"
RECORDED = ("recipe", "bits", "seed", "degradation", "start")


def record_of_folder(folder: Path) -> dict[str, Any]:
    """What a quantized folder tells of its own making, nothing where it has no record.

    Raises:
        ValueError: the record cannot be read.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return {"folder": folder.name}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made = {"steps_made": sum(map(len, record["loss"].values()))} if "loss" in record else {}
        return {"folder": folder.name} | {name: record[name] for name in RECORDED if name in record} | made
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): remove it, or start from another folder") from error


def start_from_folder(
    folder: Path, layers: dict[str, CalibratingMixin], samples: dict[str, InputSample], options: Initialisation
) -> None:
    """`start_from` for every layer, from the quantized pipeline in ``folder``.

    Args:
        layers, samples: by "component.layer".

    Raises:
        ValueError: the folder is not quantized, of another model, or rotated otherwise. OSError: it cannot be read.
    """
    pipeline = load_pipeline(folder, kind_of_folder(folder))
    found = {name: _deployed(pipeline, name) for name in layers}
    for name, layer in layers.items():
        deployed = found[name]
        if deployed is None:
            raise ValueError(f"{folder} has no quantized layer {name}: start from a quantized folder of the same model")
        rotation = layer.rotation if isinstance(layer, TokenLinear) else 0
        if deployed.spec.rotation != rotation:  # then the weights of other layers are rotated otherwise, too
            raise ValueError(
                f"{folder} has inputs rotated by {deployed.spec.rotation} in {name}, and this recipe by {rotation}: start from a"
                " folder of a recipe with the same layer.rotation"
            )
    other_bits: dict[int, list[str]] = {}  # layers that share an input of other bits than in the folder
    for name, deployed in found.items():
        assert deployed is not None  # checked above
        layer = layers[name]
        start_from(layer, deployed.to(layer.weight.device), samples[name].rows, options)
        if "input_lower" in layer._parameters and deployed.spec.activation_bits != layer.layer_scheme.activation_bits:
            other_bits.setdefault(id(layer.log_smooth), []).append(name)
    for names in other_bits.values():  # what they had belongs to another smoothing
        set_input_bounds([layers[name] for name in names], samples[names[0]], options)


def _deployed(pipeline: CheckpointPipeline, name: str) -> DeployedLayer | None:
    """The quantized layer of that "component.layer", None where there is none."""
    component, _, path = name.partition(".")
    try:
        layer = pipeline.components[component].get_submodule(path)
    except (AttributeError, KeyError):
        return None
    return layer if isinstance(layer, DeployedLayer) else None


def _bounds(scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds that this scale and zero point come from; no zero point where codes are symmetric."""
    smallest, largest = code_range(bits, symmetric=zero_point is None)
    zero = 0 if zero_point is None else zero_point.float()
    return (smallest - zero) * scale, (largest - zero) * scale


@torch.no_grad()
def start_from(layer: CalibratingMixin, deployed: DeployedLayer, rows: torch.Tensor, options: Initialisation) -> None:
    """Sets the parameters of ``layer`` so that it computes what ``deployed`` does, or nearly so.

    The difference to the original weight becomes the weight's change, where the recipe trains one, else the merged adapter, by
    its leading singular vectors. With a change, or an adapter of the weight's full rank, and a branch and bits as in ``deployed``
    the two are equal; a branch of another rank is made anew from the weight that ``deployed`` stands for, and bounds of weights
    and exponents of other bits are set as for any layer. Bounds of inputs of other bits are left to `start_from_folder`.

    Args:
        layer: initialised already.
        rows: (positions, C) sample of its input.
        options: how weight bounds are set, where they are not those of ``deployed``.

    Raises:
        ValueError: it is a layer of another model, or on another grid.
    """
    spec, scheme, own = deployed.spec, layer.layer_scheme, layer._parameters
    if spec.kind == "linear" and spec.grid != scheme.grid:
        raise ValueError(f"{deployed} is on another grid than the recipe's, {scheme.grid}: start from a folder of its own")
    shape = tuple(layer.weight.shape[:2])
    change = _weight_of(deployed) - layer.weight.float() if (spec.out_channels, spec.in_channels) == shape else None
    if change is None or (layer.bias is None) != (deployed.bias is None) or change.norm() > layer.weight.float().norm():
        raise ValueError(f"{deployed} is of another model than the layer with a weight of {shape}: start from the same model")
    layer.log_smooth.copy_(deployed.smooth.log())
    if layer.bias is not None and deployed.bias is not None:
        layer.bias_change.copy_(deployed.bias - layer.bias)
    if isinstance(layer, TokenLinear) and "weight_change" in own:
        layer.weight_change.copy_(change)
    elif "adapter_up" in own:
        set_adapter(layer, change)
    if scheme.rank_for(layer) == spec.rank:
        if spec.rank:
            layer.branch_up.copy_(deployed.branch_up)
            layer.branch_down.copy_(deployed.branch_down * deployed.smooth)
        _set_weight_bounds(layer, deployed, rows, options)
    else:
        set_branch(layer, rows, options)
    same_input = spec.activation_bits == scheme.activation_bits
    if isinstance(layer, TokenLinear) and scheme.exponents:
        if same_input and spec.exponents:
            layer.input_exponents.copy_(deployed.input_exponents)
        else:
            layer.set_exponents(rows)
    if "input_lower" in own and same_input and spec.grid == "tensor":
        lower, upper = _bounds(deployed.input_scale, deployed.input_zero_point, spec.activation_bits)
        layer.input_lower.copy_(lower)
        layer.input_upper.copy_(upper)


def _weight_of(deployed: DeployedLayer) -> torch.Tensor:
    """What the deployed layer multiplies its input with but for rounding it, float32."""
    weight = weight_codes(deployed) if deployed.spec.weight_bits < 16 else deployed.weight.float()
    over_outputs, over_inputs = (-1, *[1] * (weight.dim() - 1)), (1, -1, *[1] * (weight.dim() - 2))
    if deployed.spec.weight_bits < 16:
        weight = weight * deployed.weight_scale.view(over_outputs)
    if deployed.spec.rotation:
        weight = rotated(weight, deployed.spec.rotation)  # which is its own inverse
    if deployed.spec.rank:
        weight = weight + torch.einsum("nr...,rc->nc...", deployed.branch_up.float(), deployed.branch_down.float())
    return weight * deployed.smooth.view(over_inputs)


def _set_weight_bounds(layer: CalibratingMixin, deployed: DeployedLayer, rows: torch.Tensor, options: Initialisation) -> None:
    bits = layer.layer_scheme.weight_bits
    if bits == 16:
        return
    if bits != deployed.spec.weight_bits:
        weight_bounds(layer, rows, options)
        return
    lower, upper = _bounds(deployed.weight_scale, deployed.weight_zero_point, bits)
    layer.weight_lower.copy_(lower)
    layer.weight_upper.copy_(upper)
