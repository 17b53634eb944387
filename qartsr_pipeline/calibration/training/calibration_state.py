"""What one calibration works on, and its saved state: quantization parameters, optimizer and position, and of which run it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from qartsr_pipeline.calibration.data.patches import Patches
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.family import Family
from qartsr_pipeline.calibration.recipe import Recipe, RecipeError
from qartsr_pipeline.calibration.saving import load_tensors, save_tensors
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.progress import SILENT, Progress
from qartsr_pipeline.calibration.training.workers import ALONE, Workers
from qartsr_pipeline.quantization.calibrating import CalibratingMixin

STATE_NAME = "state.pt"
ENTRIES = {"identity", "parameters", "stage_index", "turn_index", "step", "losses", "turns", "errors_before", "optimizer"}


@dataclass(frozen=True)
class StateFile:
    """Where a run's state is kept.

    Attributes:
        path: continued from if it is there, written to; None for no state.
        every: steps between saves, beside those at the end of every stage; 0 for none.
        identity: what the run is a function of; a state of another one is not continued.
    """

    path: Path | None = None
    every: int = 20
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def exists(self) -> bool:
        return self.path is not None and self.path.exists()


NO_STATE = StateFile()


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
    save_tensors(path, {"identity": identity, "parameters": quantization_parameters(layers), **entries})


def _read(path: Path) -> dict[str, Any]:
    state = load_tensors(path, "a calibration state", f"restore it, or remove {path} to begin anew")
    if not isinstance(state, dict) or ENTRIES - state.keys():
        raise ValueError(f"{path} is no calibration state: choose another output folder, or remove it")
    return state


def started_from(path: Path) -> dict[str, Any]:
    """What is recorded of the run whose parameters another one starts from: recipe, bits, seed, what it started from, and how
    many of the recipe's steps it has made.
    """
    state = _read(path)
    return state["identity"] | {"steps_made": sum(map(len, state["losses"].values()))}


@torch.no_grad()
def load_parameters(path: Path, layers: dict[str, CalibratingMixin], weights: str) -> None:
    """Sets the layers' parameters to those of another run's state, where they have the same name.

    Raises:
        ValueError: the state is of another model, or of other ranks; the message says which.
    """
    state = _read(path)
    if state["identity"]["weights"] != weights:
        raise ValueError(f"{path} is of a run with another model: start from one with the same weights and timestep")
    for name, parameter in quantization_parameters(layers).items():
        before = state["parameters"].get(name)
        if before is not None and before.shape != parameter.shape:
            raise ValueError(
                f"{path} has {name} of shape {tuple(before.shape)}, not {tuple(parameter.shape)}: use that run's ranks,"
                f" or start from the folder that it wrote, {path.parent / 'model'}, which is adapted to others"
            )
        if before is not None:
            parameter.copy_(before)


@torch.no_grad()
def load_calibration(path: Path, layers: dict[str, CalibratingMixin], identity: dict[str, Any]) -> dict[str, Any]:
    """Reads the state, sets the layers' parameters, and returns the other entries.

    Raises:
        ValueError: damaged, of another kind, or of a run with another recipe, bits, seed, data or model.
    """
    state = _read(path)
    there = state["identity"] | {"recipe": _with_all_keys(state["identity"].get("recipe"))}
    different = [name for name, value in identity.items() if there.get(name) != value]
    if different:
        raise ValueError(
            f"{path} is of a run with other {', '.join(different)}, or of another version: repeat that run's arguments to"
            " continue it, or choose another output folder"
        )
    own = quantization_parameters(layers)
    for name, tensor in state["parameters"].items():
        own[name].copy_(tensor)
    return state


def _with_all_keys(recipe: Any) -> Any:
    """A recorded recipe with the keys that recipes have got since, at the values that mean what was done before."""
    try:
        return Recipe.from_dict(recipe).to_dict()
    except RecipeError:
        return recipe


@dataclass(frozen=True)
class CalibrationContext:
    """Models, method and data of one calibration.

    Attributes:
        pipeline: full precision; its layers are replaced by calibrating ones.
        full_precision: another instance of the same model, which stays as it is.
        bits: of weights and activations, 2, 3, 4, 6, 8 or 16.
        patches: where calibration patches come from.
        degradation: a name in `DEGRADATIONS`.
        perceptual: needed if a stage of the recipe has such a loss.
        data: fingerprint of what ``patches`` are cut from: a state is not continued with another.
        progress: what is told how far it is.
        workers: the processes that share the work; all have the same context.
    """

    pipeline: DiffusionPipeline
    full_precision: DiffusionPipeline
    recipe: Recipe
    bits: tuple[int, int]
    patches: Patches
    seed: int = 0
    degradation: str = "bicubic"
    perceptual: Perceptual | None = None
    data: dict[str, Any] | None = None
    progress: Progress = SILENT
    workers: Workers = ALONE
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", family_of(self.pipeline))

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(next(iter(self.family.models(self.pipeline).values())).parameters()).device
