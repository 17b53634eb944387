"""Optimizer groups over quantization parameters: what is trained, and how large a step is for each."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from qartsr_pipeline.quantization.calibrating import CalibratingMixin

# Prefixes of parameter names, by the name that a recipe's `train` has for them. A step factor is no bound: the longer name wins.
PARAMETERS = {
    "smoothing": ("log_smooth",),
    "offset": ("input_offset",),
    "branch": ("branch_up", "branch_down"),
    "adapter": ("adapter_up", "adapter_down"),
    "bounds": ("weight_lower", "weight_upper", "input_lower", "input_upper"),
    "step": ("weight_log_step", "input_log_step"),
}


def step_size(layer: CalibratingMixin, name: str) -> float:
    """What a learning rate of 1 means for a parameter: about its own size."""
    parameter = layer.get_parameter(name)
    size = float(parameter.detach().abs().mean())
    if "log_" in name:
        return 1.0  # trained in the logarithm: already relative
    if name == "adapter_up":  # starts at 0: measured by the change of the weight that it brings
        size = float(layer.weight.abs().mean()) * math.sqrt(layer.adapter_down.shape[1] / layer.adapter_down.shape[0])
    elif name == "adapter_down":
        size *= 0.1
    elif name == "input_offset" and "input_upper" in layer._parameters:  # may start at 0: measured by the range of the input
        size = float((layer.input_upper - layer.input_lower).abs()) * float((-layer.log_smooth).exp().mean()) * 0.1
    return max(size, 1e-6)


def has_any(layer: CalibratingMixin, train: tuple[str, ...]) -> bool:
    """Whether the layer has a parameter of one of these kinds, names as in `PARAMETERS`."""
    return any(layer._parameters.get(name) is not None for kind in train for name in PARAMETERS[kind])


def parameter_groups(layers: Iterable[CalibratingMixin], train: tuple[str, ...], known: set[int]) -> list[dict]:
    """Optimizer groups, one a parameter, with the size of its step as "relative".

    Args:
        train: names as in `PARAMETERS`.
        known: ids of parameters that are trained already, or shared with a layer before; extended by those found.
    """
    groups = []
    for layer in layers:
        for kind in train:
            for name in PARAMETERS[kind]:
                parameter = layer._parameters.get(name)
                if parameter is None or id(parameter) in known:
                    continue
                known.add(id(parameter))
                parameter.requires_grad_(True)
                size = step_size(layer, name)
                groups.append({"params": [parameter], "lr": size, "relative": size})
    return groups


@torch.no_grad()
def keep_zero_inside(layers: Iterable[CalibratingMixin]) -> None:
    """Puts bounds that crossed 0 back onto it: beyond, quantization treats them as 0 and no gradient would bring them back."""
    for layer in layers:
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("_lower"):
                parameter.clamp_(max=0)
            elif name.endswith("_upper"):
                parameter.clamp_(min=0)
