"""Extended end-to-end training (ET, QArtSR's third stage): the parameters of all modules at once, on fresh patches every step.

The loss compares the quantized model's picture with the full-precision model's, a1 perceptual + a2 L2 (arXiv 2503.05584), so
that the modules that were quantized last are trained as long as the first.
"""

from __future__ import annotations

import numpy as np
import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.pairs import Patches, sample_pair
from qartsr_pipeline.calibration.recipe import Stage
from qartsr_pipeline.calibration.training.losses import Perceptual, picture_loss, relative_l2
from qartsr_pipeline.calibration.training.network_run import outputs_of, picture_of
from qartsr_pipeline.calibration.training.workers import ALONE, Workers


def end_to_end_loss(
    pipeline: QArtSRPipeline,
    full_precision: QArtSRPipeline,
    patches: Patches,
    stage: Stage,
    seed: list[int],
    perceptual: Perceptual | None,
    degradation: str = "bicubic",
    workers: Workers = ALONE,
) -> torch.Tensor:
    """The loss of one step, a scalar.

    Args:
        seed: of this step's patches.
        workers: who share them.
    """
    rng = np.random.default_rng(seed)
    up, _ = sample_pair(patches, stage.batch, stage.patch, rng, degradation)
    up = workers.part(up).to(pipeline.vae.device)
    with torch.no_grad(), outputs_of({"unet": full_precision.unet}) as wanted:
        target = picture_of(full_precision, up)
    with outputs_of({"unet": pipeline.unet}) as seen:
        picture = picture_of(pipeline, up)
    loss = picture_loss(stage.loss, picture, target, perceptual)
    if stage.loss.get("noise_l2"):
        loss = loss + stage.loss["noise_l2"] * relative_l2(seen["unet"], wanted["unet"])
    return loss
