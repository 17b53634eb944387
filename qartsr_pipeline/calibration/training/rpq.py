"""Per-module quantization (RPQ, QArtSR's second stage, arXiv 2503.05584): modules get their turn one after another.

While a module has its turn, the loss is its own output's distance to full precision's (`module_l2`) plus the picture's; in
reversed order what runs before it is still full precision and what runs after it is already quantized. The gradient reaches the
module and all modules that are quantized already. Other orders, parts instead of blocks, and a network at full precision around
the module make the stages of other methods.

The patches are the same few batches for every module: their full-precision block outputs are recorded once and replayed.
"""

from __future__ import annotations

import numpy as np
import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.pairs import Patches, sample_pair
from qartsr_pipeline.calibration.recipe import Stage
from qartsr_pipeline.calibration.training.blocks import Block, Turn
from qartsr_pipeline.calibration.training.losses import Perceptual, picture_loss, relative_l2
from qartsr_pipeline.calibration.training.network_run import outputs_of, picture_of
from qartsr_pipeline.calibration.training.replay import Recording
from qartsr_pipeline.calibration.training.tensor_store import TensorStore
from qartsr_pipeline.calibration.training.workers import ALONE, Workers


def record(
    pipeline: QArtSRPipeline,
    blocks: list[Block],
    stage: Stage,
    patches: Patches,
    seed: list[int],
    count: int,
    store: TensorStore,
    degradation: str = "bicubic",
    workers: Workers = ALONE,
) -> Recording:
    """Runs the full-precision network on the stage's batches, and keeps what every block returns.

    Args:
        seed: of the patches.
        count: batches.
        workers: who share each batch.
    """
    quantizing = {block: block.layers[0].quantizing for block in blocks}
    for block in blocks:
        block.quantize(False)
    recording = Recording(pipeline, blocks, store)
    for index in range(count):
        rng = np.random.default_rng([*seed, index])
        up, _ = sample_pair(patches, stage.batch, stage.patch, rng, degradation)
        recording.add(workers.part(up).to(pipeline.vae.device))
    for block, before in quantizing.items():
        block.quantize(before)
    return recording


def start_turn(blocks: list[Block], turn: Turn, stage: Stage) -> None:
    """Quantizes the turn's blocks, beside those before or alone."""
    if stage.others == "full_precision":
        for block in blocks:
            block.quantize(False)
    for block in turn.blocks:
        block.quantize(True)


def module_loss(
    recording: Recording, turn: Turn, weights: dict[str, float], step: int, perceptual: Perceptual | None
) -> torch.Tensor:
    """The loss of one step of a turn, a scalar.

    The module's own target is what it returned at full precision for the full-precision input, also where it now sees a quantized
    one: what came before is then corrected for as well (our reading).
    """
    index = step % len(recording.inputs)
    first = next(block for block in recording.blocks if block.layers[0].quantizing)
    last = turn.blocks[-1]
    watched = {"module": last.module, "unet": recording.pipeline.unet}
    with recording.replayed(index, first), outputs_of(watched) as seen:
        picture = picture_of(recording.pipeline, recording.inputs[index])
    loss = picture_loss(weights, picture, recording.pictures[index], perceptual)
    if weights.get("module_l2"):
        loss = loss + weights["module_l2"] * relative_l2(seen["module"], recording.output(index, last))
    if weights.get("noise_l2"):
        loss = loss + weights["noise_l2"] * relative_l2(seen["unet"], recording.noises[index])
    return loss
