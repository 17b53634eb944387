"""The stages of a training: RPQ, module after module, and ET, all modules at once (QArtSR, arXiv 2503.05584).

Reversed per-module quantization (RPQ, the second stage of the paper) quantizes modules one after another. The paper's terms, and
where they are here:

- *modules*: the blocks of the network, or its parts, in the order that the stage gives (`StagePlan.turns`). Reversed, what runs
  before a module is still full precision and what runs after it is quantized already.
- *module loss*: distance of the module's own output to what it returns at full precision (the term ``module_l2``).
- *image loss*: distance of the network's image to full precision's (the terms ``image_l2``, ``image_l1``, ``perceptual``).

While a module has its turn the loss is the weighted sum of the two, and its gradient reaches the module and all modules that are
quantized already. Other orders, parts instead of blocks, and a network at full precision around the module make the stages of
other methods.

Every module is trained on the same few batches: their full-precision block outputs are recorded once (`replay`), so that a step
neither computes nor remembers what lies before the first quantized block.

Extended end-to-end training (ET, the third stage) trains the parameters of all modules at once. Every step draws fresh patches,
and compares the quantized model's image with the full-precision model's: a1 perceptual + a2 L2 in the paper, the stage's weights
here. So the modules that RPQ quantized last are trained as long as the first.
"""

from __future__ import annotations

import numpy as np
import torch

from qartsr_pipeline.calibration.family import outputs_of
from qartsr_pipeline.calibration.recipe import Stage
from qartsr_pipeline.calibration.training.blocks import Block, Turn
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.replay import Recording, TensorStore
from qartsr_pipeline.calibration.training.steps import StagePlan, Training

MEMORY_FOR_ACTIVATIONS = 2 * 2**30  # bytes of recorded block outputs that stay in memory; more go to disk


def quantize_per_module(training: Training, plan: StagePlan) -> None:
    """The whole stage, from the position on that the training is at."""
    for block in training.blocks:
        block.quantize(False)
    folder = training.state.path.parent if training.state.path else None
    with TensorStore(MEMORY_FOR_ACTIVATIONS, folder) as store:
        batches = min(training.context.recipe.cached_batches, sum(plan.steps))
        recording = record(training.context, training.blocks, plan, batches, store)
        for number, turn in enumerate(plan.turns):
            quantize_module(training.blocks, turn, plan.stage)
            if number >= training.position.turn:
                training.take_turn(plan, number, ModuleLoss(training.context, recording, plan, number))
    training.next_stage()


@torch.no_grad()
def record(context: CalibrationContext, blocks: list[Block], plan: StagePlan, batches: int, store: TensorStore) -> Recording:
    """Runs the full-precision network on so many of the stage's batches, and keeps what every block returns."""
    quantizing = {block: block.layers[0].quantizing for block in blocks}
    for block in blocks:
        block.quantize(False)
    recording = Recording(context.family, context.pipeline, blocks, store)
    stage = plan.stage
    for index in range(batches):
        rng = np.random.default_rng([context.seed, plan.index, 1, index])
        batch = context.family.training_batch(context.patches, stage.batch, stage.patch, context.degradation, rng)
        recording.add(context.workers.part(batch).to(context.device))
    for block, before in quantizing.items():
        block.quantize(before)
    return recording


def quantize_module(blocks: list[Block], turn: Turn, stage: Stage) -> None:
    """Quantizes the turn's blocks: beside those that had theirs before, or alone in a network of full precision."""
    if stage.others == "full_precision":
        for block in blocks:
            block.quantize(False)
    for block in turn.blocks:
        block.quantize(True)


class ModuleLoss:
    """Step of a turn -> its loss, a scalar: image loss plus module loss.

    The module's target is what it returned at full precision for the full-precision input, also where it now sees a quantized
    one: what came before is then corrected for as well (our reading).
    """

    def __init__(self, context: CalibrationContext, recording: Recording, plan: StagePlan, number: int):
        self.context, self.recording, self.stage = context, recording, plan.stage
        self.module = plan.turns[number].blocks[-1]
        self.first_step = sum(plan.steps[:number])  # so that not every module begins with the same batch

    def __call__(self, step: int) -> torch.Tensor:
        recording = self.recording
        index = (self.first_step + step) % len(recording.batches)
        first_quantized = next(block for block in recording.blocks if block.layers[0].quantizing)
        with recording.replayed(index, first_quantized), outputs_of({"module": self.module.module}) as seen:
            output = self.context.family.run(self.context.pipeline, recording.batches[index])
        module = None
        if self.stage.loss.get("module_l2"):
            module = seen["module"], recording.output(index, self.module)
        return self.context.family.loss(self.stage.loss, output, recording.targets[index], self.context.perceptual, module)


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
