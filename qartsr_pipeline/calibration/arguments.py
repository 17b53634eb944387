"""What a calibration run is to make, and its arguments as command line and run folder know them. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qartsr_pipeline.calibration.retraining.settings import FULL, SHORT, TIMESTEPS, Rule, parse_phase, phase_text
from qartsr_pipeline.checkpoint_files.checking import VIDEO_PIPELINE_CLASS

if TYPE_CHECKING:
    import numpy as np
    import torch

    from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline

ARGUMENTS_NAME = "run.json"
PERCEPTUAL_NAMES = ("encoder", "lpips")
DTYPES = ("float32", "bfloat16", "float16")
AUTO = "auto"  # LPIPS where it is at hand, see `losses.choose_perceptual`
VIDEO_RECIPE = "lsgquant"
RECIPES = Path(__file__).parent / "recipes"
# What may be different when a run is continued: what only the choice of the timestep and the report depend on ..
MAY_CHANGE = ("evaluate", "evaluate_in_memory", "least_bypass_cost", "quality_margin")
# .. and what the state of a run recognizes by its content, unless the model is retrained first, before there is a state.
KNOWN_BY_CONTENT = ("model", "data", "start", "model_in_memory", "data_in_memory")


@dataclass(frozen=True)
class RunArguments:
    """What a run is made with, under the names that `run.json` and the command line have for it.

    Attributes:
        model: full-precision checkpoint: folder, shipped name or Hub id.
        timestep: "keep", "search", or a number as text.
        timesteps, phases, full_phases, least_bypass_cost, quality_margin, held_out, search_bits: of the search, see
            `qartsr_pipeline.calibration.trq`; phases as NAME:STEPS:LR:PATCH:BATCH, bits such as "w4a4".
        recipe: a name, a YAML file, or what `Recipe.to_dict` gives.
        bits: such as "w4a4".
        steps: of the optimizer in all, None for the recipe's.
        set: changes to the recipe, KEY=VALUE.
        start: folder of a run, or quantized checkpoint, whose parameters this one starts from.
        data, evaluate: folders of images; None for procedural ones, and for the sample.
        perceptual: one of `PERCEPTUAL_NAMES`, or `AUTO`.
        perceptual_weights: file with the backbone of LPIPS, or a folder with one.
        dtype: that frozen weights are held in, one of `DTYPES`.
        retraining_loss: at another timestep, one of `settings.RETRAINING_LOSSES`.
        model_in_memory, data_in_memory, evaluate_in_memory: what `quantize` was given in memory, so that no folder has it; of the
            images to calibrate on their SHA-256.
    """

    model: str = "tiny-fp"
    timestep: str = "keep"
    timesteps: tuple[int, ...] = TIMESTEPS
    phases: tuple[str, ...] = SHORT
    full_phases: tuple[str, ...] = FULL
    least_bypass_cost: float = Rule.least_bypass_cost
    quality_margin: float = Rule.quality_margin
    held_out: int = 8
    search_bits: str = "w4a4"
    retraining_loss: str = "l1"
    recipe: str | dict[str, Any] = "qartsr"
    bits: str = "w4a4"
    steps: int | None = None
    set: tuple[str, ...] = ()
    start: str | None = None
    data: str | None = None
    degradation: str = "bicubic"
    perceptual: str = AUTO
    perceptual_weights: str | None = None
    evaluate: str | None = None
    dtype: str = "float32"
    seed: int = 0
    model_in_memory: bool = False
    data_in_memory: str | None = None
    evaluate_in_memory: bool = False

    def __post_init__(self) -> None:
        for name in ("bits", "search_bits"):
            object.__setattr__(self, name, getattr(self, name).lower())
        for name in ("timesteps", "set"):  # lists in JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("phases", "full_phases"):
            phases = map(parse_phase, getattr(self, name))
            object.__setattr__(self, name, tuple(map(phase_text, phases)))  # 1e-4 and 0.0001 are the same

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> RunArguments:
        """From a mapping that may hold more than these."""
        known = {part.name for part in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def differing(self, other: RunArguments) -> list[str]:
        """Names of the arguments in which ``other`` would make another run."""
        may_change = MAY_CHANGE + (KNOWN_BY_CONTENT if self.timestep == "keep" else ())
        return [
            part.name
            for part in fields(self)
            if part.name not in may_change and getattr(self, part.name) != getattr(other, part.name)
        ]

    def only_in_memory(self) -> list[str]:
        """What the run is made of that was in memory only, in words: nothing but another call of `quantize` can continue it."""
        given = {"the model": self.model_in_memory, "the images to calibrate on": self.data_in_memory}
        return [name for name, in_memory in given.items() if in_memory]


@dataclass(frozen=True)
class Order:
    """What is to be made, and where.

    Attributes:
        output: the run's folder.
        device: None for the first GPU where there is one, and for that of ``model``.
        model, data, evaluation: in memory, in the place of what the arguments name; images are (H, W, 3) and clips
            (F, H, W, 3) uint8.
        keeps_output: False if the folder is removed afterwards: no model is written then.
        continues: whether the folder holds the run already.
    """

    arguments: RunArguments
    output: Path
    device: str | torch.device | None = None
    model: CheckpointPipeline | None = None
    data: Sequence[np.ndarray] | None = None
    evaluation: Sequence[np.ndarray] | None = None
    keeps_output: bool = True
    continues: bool = False


def read_arguments(folder: Path) -> RunArguments | None:
    """Those of the run in ``folder``; None where there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / ARGUMENTS_NAME
    if not path.is_file():
        return None
    try:
        return RunArguments.of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it, or choose another output folder") from error


def default_recipe(pipeline_class: str) -> str:
    """The recipe for models of that pipeline class where none is named."""
    return VIDEO_RECIPE if pipeline_class == VIDEO_PIPELINE_CLASS else str(RunArguments.recipe)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def argument_text(name: str) -> str:
    """An argument's name as the command line writes it."""
    return name.replace("_", "-")
