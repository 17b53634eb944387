"""What a training run is a function of: its phases and settings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qartsr_pipeline.calibration.data.pairs import MULTIPLE

PHASES = ("autoencoder", "latent", "pixel", "joint")


@dataclass(frozen=True)
class Phase:
    """One stretch of training. ``patch`` is the side of the high-resolution patches in pixels."""

    name: str
    steps: int
    lr: float
    patch: int
    batch: int


def parse_phase(text: str) -> Phase:
    """From NAME:STEPS:LR:PATCH:BATCH; raises ValueError that says what is wrong with it."""
    example = f"expected NAME:STEPS:LR:PATCH:BATCH such as pixel:4000:5e-4:128:8, with NAME one of {', '.join(PHASES)}"
    parts = text.split(":")
    if len(parts) != 5:
        raise ValueError(f"the phase {text!r} has {len(parts)} parts; {example}")
    try:
        phase = Phase(parts[0], int(parts[1]), float(parts[2]), int(parts[3]), int(parts[4]))
    except ValueError as error:
        raise ValueError(f"the phase {text!r} has a part that is no number ({error}); {example}") from None
    if phase.name not in PHASES:
        raise ValueError(f"the phase {text!r} has an unknown name; {example}")
    if phase.steps < 1 or phase.batch < 1 or not 0 < phase.lr < math.inf:
        raise ValueError(f"the phase {text!r}: steps, learning rate and batch must be above 0; {example}")
    if phase.patch < MULTIPLE or phase.patch % MULTIPLE:
        raise ValueError(f"the phase {text!r}: the patch's side must be a multiple of {MULTIPLE}; {example}")
    return phase


@dataclass(frozen=True)
class Settings:
    """What a run is a function of, beside phases and pictures.

    Attributes:
        train_encoder: train the VAE's encoder in the pixel phase.
        ema: decay of the moving average of the weights.
        every: validate and save every so many steps.
        bf16: compute in bfloat16 where PyTorch holds it to be safe.
        loss: the distance, "l1" or "l2"; see `teacher_losses.loss_of`.
    """

    output: Path
    seed: int = 0
    train_encoder: bool = False
    ema: float = 0.998
    every: int = 500
    bf16: bool = True
    degradation: str = "bicubic"
    loss: str = "l1"
