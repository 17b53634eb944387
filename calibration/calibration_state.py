"""The saved state of a calibration run: quantization parameters, optimizer and position, and of which run it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from calibration.training_state import save_state
from qartsr_pipeline.quantization.calibrating import CalibratingMixin

STATE_NAME = "state.pt"
ENTRIES = {"identity", "parameters", "stage_index", "turn_index", "step", "losses", "turns", "errors_before", "optimizer"}


def quantization_parameters(layers: dict[str, CalibratingMixin]) -> dict[str, torch.Tensor]:
    """Everything that calibration may change, by "component.layer.parameter"; weights and biases are not among it."""
    return {
        f"{layer_name}.{name}": parameter.detach()
        for layer_name, layer in layers.items()
        for name, parameter in layer.named_parameters(recurse=False)
        if name not in ("weight", "bias")
    }


def save_calibration(path: Path, layers: dict[str, CalibratingMixin], identity: dict[str, Any], entries: dict[str, Any]) -> None:
    """Writes the state, whole or not at all. Raises SavingError when the disk is full; the one before is then untouched."""
    save_state(path, {"identity": identity, "parameters": quantization_parameters(layers), **entries})


@torch.no_grad()
def load_calibration(path: Path, layers: dict[str, CalibratingMixin], identity: dict[str, Any]) -> dict[str, Any]:
    """Reads the state, sets the layers' parameters, and returns the other entries.

    Raises:
        ValueError: damaged, of another kind, or of a run with another recipe, bits, seed, data or model; the message says what.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a calibration state ({type(error).__name__}): remove it to start anew"
        ) from error
    if not isinstance(state, dict) or ENTRIES - state.keys():
        raise ValueError(f"{path} is no calibration state: choose another --output, or remove it")
    different = [name for name, value in identity.items() if state["identity"].get(name) != value]
    if different:
        raise ValueError(
            f"{path} is of a run with other {', '.join(different)}: repeat that run's arguments to continue it, or choose another"
            " --output"
        )
    own = quantization_parameters(layers)
    for name, tensor in state["parameters"].items():
        own[name].copy_(tensor)
    return state
