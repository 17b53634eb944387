"""A recipe that runs in seconds on a tiny pipeline, patches for it, and the whole calibration with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.image_family import ImageFamily
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_values
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext, StateFile
from qartsr_pipeline.calibration.training.engine import calibrate
from qartsr_pipeline.calibration.training.progress import Calibrated, Callbacks
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from tiny_models import build_tiny_pipeline

COMPONENTS = ImageFamily.components

SMALL = [
    "images=4",
    "image_size=64",
    "cached_batches=2",
    *(f"stages.{i}.{key}" for i in (0, 1) for key in ("patch=32", "batch=2")),
    "layer.smoothing=ones",  # the search for smoothing and bounds has tests of its own, and takes seconds
    "layer.bounds=minmax",
    "layer.rounding=nearest",
    "layer.branch_rank=2",
    *(f"budget.{limit}=null" for limit in ("extra_bits", "branch", "wider")),
    "layer.adapter_rank=2",
    "stages.0.share=0.3",  # both stages
    "stages.1.share=0.7",
    "stages.1.rates={}",
]


class SmoothPatches:
    """Random pictures with large structures, as a source of patches."""

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        coarse = torch.from_numpy(rng.random((count, 3, 5, 5), dtype=np.float32))
        return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def small_recipe(*changes: str, name: str = "qartsr") -> Recipe:
    """The recipe with small patches; "perceptual" goes, unless a change gives it back."""
    without = ["stages.1.loss={image_l2: 1.0}"] if name == "qartsr" else []
    return with_values(load_recipe(name), [*(SMALL if name == "qartsr" else SMALL[:3]), *without, *changes])


def context_of(recipe: Recipe, bits: tuple[int, int] = (4, 4), **options: Any) -> CalibrationContext:
    """A calibration of the tiny pipeline."""
    options.setdefault("patches", SmoothPatches())
    return CalibrationContext(build_tiny_pipeline(), build_tiny_pipeline(), recipe, bits, **options)


def calibrated(
    recipe: Recipe,
    bits: tuple[int, int] = (4, 4),
    state: Path | None = None,
    every: int = 20,
    start: Path | None = None,
    stop_after: int | None = None,
    **options: Any,
) -> tuple[QArtSRPipeline, Calibrated]:
    """The quantized tiny pipeline, in simulation; ``options`` are the context's."""
    if stop_after is not None:
        options["progress"] = Callbacks(lambda step, *_: step == stop_after)
    context = context_of(recipe, bits, **options)
    return context.pipeline, calibrate(context, StateFile(state, every), start)


def all_layers(pipeline: QArtSRPipeline) -> dict[str, CalibratingMixin]:
    """ "component.layer" -> calibrating layer."""
    return family_of(pipeline).layers(pipeline)


def picture(pipeline: QArtSRPipeline) -> torch.Tensor:
    """What the pipeline makes of a small image, (1, 3, 96, 96)."""
    low = SmoothPatches().sample(1, 24, np.random.default_rng(5))
    return pipeline(low, output_type="pt", color_fix=None).images
