"""Memory for large models: two instances of a pipeline on the same weights, and blocks that keep nothing for the gradient.

A calibrating layer keeps some 17 bytes a weight for its gradient (weight, residual, codes, mask): for 866 million that is more
than a GPU has. Blocks of large models therefore keep their inputs only, and run a second time during the backward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.checkpoint import checkpoint

from qartsr_pipeline.calibration.training.blocks import Block

LARGE = 200_000_000  # weights of calibrating layers from which their blocks run twice
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


def _models(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [component for component in pipeline.components.values() if isinstance(component, nn.Module)]


def on_the_same_weights(pipeline: Pipeline) -> Pipeline:
    """Another instance whose weights are the very tensors of ``pipeline``: as long as nobody writes into them, each may get other
    layers without the other noticing. Calibration never writes into them (a hash is compared).
    """
    tensors = [tensor for model in _models(pipeline) for tensor in (*model.parameters(), *model.buffers())]
    return copy.deepcopy(pipeline, {id(tensor): tensor for tensor in tensors})


@contextmanager
def gradients_restored(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Afterwards, every parameter of the pipeline requires a gradient, or does not, as before."""
    before = [(parameter, parameter.requires_grad) for model in _models(pipeline) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def give_own_weights(pipeline: DiffusionPipeline) -> None:
    """Copies, in place, the tensors that the pipeline may share with another instance, see `on_the_same_weights`."""
    for model in _models(pipeline):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone()


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
