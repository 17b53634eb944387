"""A recipe that runs in seconds on a tiny pipeline, and patches for it."""

from __future__ import annotations

import numpy as np
import torch

from qartsr_pipeline.calibration.recipe import Recipe, load_recipe, with_values

SMALL = [
    "images=4",
    "image_size=64",
    "cached_batches=2",
    *(f"stages.{i}.{key}" for i in (0, 1) for key in ("patch=32", "batch=2")),
    "layer.smoothing=ones",  # the search for smoothing and bounds has tests of its own, and takes seconds
    "layer.bounds=minmax",
    "layer.branch_rank=2",
    "layer.branch_budget=0",
    "layer.adapter_rank=2",
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
