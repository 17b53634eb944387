"""What retraining is a function of, beside model and images: phases, settings, and the search for a timestep.

Nothing heavy is imported here, so that command lines can show the defaults quickly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qartsr_pipeline.calibration.data import MULTIPLE

PHASES = ("autoencoder", "latent", "pixel", "joint")
DISTANCE_NAMES = ("l1", "l2")  # the keys of `losses.DISTANCES`
RETRAINING_LOSSES = (*DISTANCE_NAMES, "l1+lpips", "l2+lpips")  # the last one is the paper's
TIMESTEPS = (20, 100, 250, 500, 999)
SHORT = ("latent:100:1e-4:96:8", "pixel:200:1e-4:96:8")  # larger rates lose more in so few steps than they gain
FULL = ("latent:1000:2e-4:96:8", "pixel:3000:2e-4:96:8")


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        name: one of `PHASES`, or of the phases that a subclass of `Trainer` adds.
        patch: side of the high-resolution patches in pixels.
    """

    name: str
    steps: int
    lr: float
    patch: int
    batch: int


def parse_phase(text: str, names: Sequence[str] = PHASES) -> Phase:
    """From NAME:STEPS:LR:PATCH:BATCH with one of ``names``; raises ValueError that says what is wrong with it."""
    example = f"expected NAME:STEPS:LR:PATCH:BATCH such as pixel:4000:5e-4:128:8, with NAME one of {', '.join(names)}"
    parts = text.split(":")
    if len(parts) != 5:
        raise ValueError(f"the phase {text!r} has {len(parts)} parts; {example}")
    try:
        phase = Phase(parts[0], int(parts[1]), float(parts[2]), int(parts[3]), int(parts[4]))
    except ValueError as error:
        raise ValueError(f"the phase {text!r} has a part that is no number ({error}); {example}") from None
    if phase.name not in names:
        raise ValueError(f"the phase {text!r} has an unknown name; {example}")
    if phase.steps < 1 or phase.batch < 1 or not 0 < phase.lr < math.inf:
        raise ValueError(f"the phase {text!r}: steps, learning rate and batch must be above 0; {example}")
    if phase.patch < MULTIPLE or phase.patch % MULTIPLE:
        raise ValueError(f"the phase {text!r}: the patch's side must be a multiple of {MULTIPLE}; {example}")
    return phase


def phase_text(phase: Phase) -> str:
    """NAME:STEPS:LR:PATCH:BATCH, which `parse_phase` reads."""
    return f"{phase.name}:{phase.steps}:{phase.lr}:{phase.patch}:{phase.batch}"


@dataclass(frozen=True)
class Settings:
    """How a model is trained, whatever the phase.

    Attributes:
        train_encoder: train the VAE's encoder in the pixel phase.
        ema: decay of the moving average of the weights.
        every: validate and save each time this many steps are done.
        bf16: compute in bfloat16 where PyTorch considers it safe.
        degradation: of training patches, a name in `DEGRADATIONS`.
        loss: distance of latents and of images, one of `DISTANCE_NAMES`; see `losses.PhaseLoss`.
        adapters: train low-rank adapters on UNet and VAE encoder instead of all UNet weights; None for models above
            `adapters.LARGE` only. Used by TRQ.
    """

    seed: int = 0
    train_encoder: bool = False
    ema: float = 0.998
    every: int = 500
    bf16: bool = True
    degradation: str = "bicubic"
    loss: str = "l1"
    adapters: bool | None = None


@dataclass(frozen=True)
class Rule:
    """The limits of the rule that picks a timestep, in dB of PSNR-Y; see `qartsr_pipeline.calibration.trq`.

    Attributes:
        least_bypass_cost: what leaving the UNet out must cost at a timestep that may be chosen.
        quality_margin: a full-precision quality this little below the best one counts as equal to it.
    """

    least_bypass_cost: float = 1.0
    quality_margin: float = 0.1


# Entries of a record that a retrained model depends on, and options among them.
MADE_WITH = ("start_sha256", "timestep", "phases", "adapters", "perceptual", "data", "held_out")
OPTIONS = ("seed", "train_encoder", "bf16", "degradation", "loss")


def check_made_with(path: Path, before: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Makes sure that a model or state was made as ``record`` says. What an older version did not record is not compared.

    Args:
        path: the model's folder, or the state.
        before, record: what is recorded of it, and of the run that is to continue; see `trq.TRQ`.

    Raises:
        ValueError: it was made with something else; the message names it.
    """
    compared = {name: (before[name], record[name]) for name in MADE_WITH if name in before and name in record}
    if "start_sha256" not in compared and "start" in before:
        compared["start"] = before["start"], record["start"]
    options = before.get("options") or {}
    compared |= {name: (options[name], record["options"][name]) for name in OPTIONS if name in options}
    for name, (was, now) in compared.items():
        if was != now:
            name = name.removesuffix("_sha256")
            values = f" ({was} there, {now} now)" if len(f"{was}{now}") < 80 else ""
            raise ValueError(
                f"{path} was retrained with other arguments: {name} is another{values}. Repeat that run's arguments to continue"
                f" it, choose another output folder, or remove {path} to retrain anew"
            )


@dataclass(frozen=True)
class TimestepSearch:
    """The search for the timestep at which a model bears quantization best; see `qartsr_pipeline.calibration.trq`.

    Attributes:
        timesteps: candidates, different ones from 0 to 999.
        phases, full_phases: of the short retraining at each candidate, and of the one at the chosen timestep.
        held_out: how many images are kept for measuring, at least 1.
        bits: of weights and activations in the plain quantization that candidates are measured under.
    """

    timesteps: tuple[int, ...] = TIMESTEPS
    phases: tuple[Phase, ...] = tuple(map(parse_phase, SHORT))
    full_phases: tuple[Phase, ...] = tuple(map(parse_phase, FULL))
    rule: Rule = field(default_factory=Rule)
    held_out: int = 8
    bits: tuple[int, int] = (4, 4)

    def __post_init__(self) -> None:
        if not self.timesteps or len(set(self.timesteps)) < len(self.timesteps) or not all(0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps {list(self.timesteps)}: expected different whole numbers from 0 to 999")
        if self.held_out < 1:
            raise ValueError(f"{self.held_out} images held out: candidates are measured on at least one")

    @classmethod
    def parse(
        cls,
        timesteps: Sequence[int],
        phases: Sequence[str],
        full_phases: Sequence[str],
        least_bypass_cost: float,
        quality_margin: float,
        held_out: int,
        bits: tuple[int, int],
    ) -> TimestepSearch:
        """From the arguments of a command line, phases as texts; raises ValueError that says what is wrong with them."""
        short, full = (tuple(map(parse_phase, texts)) for texts in (phases, full_phases))
        return cls(tuple(timesteps), short, full, Rule(least_bypass_cost, quality_margin), held_out, bits)
