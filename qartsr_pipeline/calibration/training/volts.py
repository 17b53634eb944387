"""VOLTS of LSGQuant (arXiv 2602.03182): how long each layer is trained, by how much its input varies from clip to clip.

1. *Statistics*: mu_k, the mean input of a layer over all tokens of calibration clip k, (C,): `observers.InputSample.means`.
2. *Sensitivity*: S = mean over channels of var over clips of mu_k; or, the other reading of the paper, the variance over clips of
   the mean of mu_k over its channels. No official program exists that could decide between the two.
3. *Classes*: "low", "medium" and "high". The paper's thresholds are 0.001 and 0.075, and do not carry over to other models:
   percentiles of the model's own layers are the default (our reading).
4. *Steps*: 1 for low, 30 for medium, and for high ones until they converge, here within what is left of the stage's steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from qartsr_pipeline.calibration.recipe_layers import Volts
from qartsr_pipeline.calibration.start.observers import InputSample
from qartsr_pipeline.calibration.training.progress import LayerSensitivity

LOW, MEDIUM, HIGH = "low", "medium", "high"


def sensitivity(means: Sequence[torch.Tensor], reading: str) -> float:
    """S of one layer.

    Args:
        means: mu_k (C,) of each clip. With one clip nothing varies, and S is 0.
        reading: see `Volts`.
    """
    clips = torch.stack(list(means)).double()  # (clips, C)
    values = clips if reading == "channels" else clips.mean(1, keepdim=True)
    return float(values.var(0, unbiased=False).mean())


def classified(samples: Mapping[str, InputSample], volts: Volts) -> dict[str, LayerSensitivity]:
    """Sensitivity and class of every layer, not trained yet."""
    values = {name: sensitivity(sample.means, volts.reading) for name, sample in samples.items()}
    limits = (
        np.percentile(list(values.values()), [volts.low, volts.high]) if volts.rule == "percentile" else (volts.low, volts.high)
    )
    kinds = {name: LOW if value <= limits[0] else MEDIUM if value <= limits[1] else HIGH for name, value in values.items()}
    return {name: {"value": value, "kind": kinds[name], "steps": 0} for name, value in values.items()}


def planned_steps(kinds: Sequence[str], total: int, volts: Volts) -> list[int]:
    """Steps at most of layers of these classes, together at most ``total``.

    Low and medium ones get theirs, high ones at least as many as medium ones, and evenly what is left. All get less where the
    total is too small for that.
    """
    wanted = [volts.low_steps if kind == LOW else volts.medium_steps for kind in kinds]
    if sum(wanted) > total:
        return [steps * total // sum(wanted) for steps in wanted]
    high = [index for index, kind in enumerate(kinds) if kind == HIGH]
    left = total - sum(wanted)
    for place, index in enumerate(high):
        wanted[index] += left * (place + 1) // len(high) - left * place // len(high)
    return wanted
