"""One differentiable run of the network, with what losses look at on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qartsr_pipeline import QArtSRPipeline


def picture_of(pipeline: QArtSRPipeline, up: torch.Tensor) -> torch.Tensor:
    """The network's picture for an enlarged input (B, 3, H, W) in [-1, 1]; differentiable, colours as they come."""
    network = pipeline.network()
    return network.decode(network.step(network.encode(up)))


def tensor_of(output: Any) -> torch.Tensor:
    """What a block or model returned, without the tuple that some put around it."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Within, collects what the modules return, by name."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: seen.__setitem__(name, tensor_of(output)))
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
