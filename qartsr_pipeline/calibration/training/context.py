"""What every part of one calibration works on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from qartsr_pipeline.calibration.data.patches import Patches
from qartsr_pipeline.calibration.family import Family, family_of
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.progress import SILENT, Progress
from qartsr_pipeline.calibration.training.workers import ALONE, Workers


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
