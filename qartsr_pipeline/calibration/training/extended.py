"""Extended end-to-end training (ET, QArtSR's third stage, arXiv 2503.05584): the parameters of all modules at once.

Every step draws fresh patches, and compares the quantized model's image with the full-precision model's: a1 perceptual + a2 L2 in
the paper, the stage's weights here. So the modules that RPQ quantized last are trained as long as the first.
"""

from __future__ import annotations

import numpy as np
import torch

from qartsr_pipeline.calibration.training.context import CalibrationContext
from qartsr_pipeline.calibration.training.steps import StagePlan, Training


def train_end_to_end(training: Training, plan: StagePlan) -> None:
    """The whole stage, from the position on that the training is at."""
    for block in training.blocks:
        block.quantize(True)
    training.take_turn(plan, 0, lambda step: end_to_end_loss(training.context, plan, step))
    training.next_stage()


def end_to_end_loss(context: CalibrationContext, plan: StagePlan, step: int) -> torch.Tensor:
    """The loss of one step, a scalar."""
    family, stage = context.family, plan.stage
    rng = np.random.default_rng([context.seed, plan.index, 2, step])
    batch = family.training_batch(context.patches, stage.batch, stage.patch, context.degradation, rng)
    batch = context.workers.part(batch).to(context.device)
    with torch.no_grad():
        target = family.run(context.full_precision, batch)
    output = family.run(context.pipeline, batch)
    return family.loss(stage.loss, output, target, context.perceptual)
