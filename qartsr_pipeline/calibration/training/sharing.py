"""Memory for large models: two instances of a pipeline on the same weights, and blocks that keep nothing for the gradient.

A calibrating layer keeps some 17 bytes a weight for its gradient (weight, residual, codes, mask): for 866 million that is more
than a GPU has. Blocks of large models therefore keep their inputs only, and run a second time during the backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.retraining.adapters import LARGE
from qartsr_pipeline.calibration.training.blocks import Block


def on_the_same_weights(pipeline: QArtSRPipeline) -> QArtSRPipeline:
    """Another instance whose weights are the very tensors of ``pipeline``: as long as nobody writes into them, each may get other
    layers without the other noticing. Calibration never writes into them (a hash is compared).
    """
    models = [component for component in pipeline.components.values() if isinstance(component, nn.Module)]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    return copy.deepcopy(pipeline, {id(tensor): tensor for tensor in tensors})


@contextmanager
def recomputed(blocks: list[Block]) -> Iterator[None]:
    """Within, blocks of a large model run again during the backward pass, instead of keeping what they computed."""
    large = sum(layer.weight.numel() for block in blocks for layer in block.layers) > LARGE
    chosen = blocks if large else []
    for block in chosen:
        block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in chosen:
            del block.module.forward
