"""What `torch.compile` sees of a deployed layer: one operator, whose inside it does not trace.

The operator's arguments are the input and the layer's number; everything else is looked up when it runs. Which backend computes
the layer, what that prepared, and operators that only some builds of torch have thus stay out of the graph, which has no break.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from weakref import WeakValueDictionary

import torch

from qartsr_pipeline.kernels.stored_layer import StoredLayer

_numbers = itertools.count()
_layers: WeakValueDictionary[int, StoredLayer] = WeakValueDictionary()


def register(layer: StoredLayer) -> int:
    """A number for the layer, of its own, as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _in_order(y: torch.Tensor) -> torch.Tensor:
    """Backends differ in the memory format they return; a graph needs one. Maps are channels-last."""
    return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.contiguous_format)


def make_operator(run: Callable[[torch.Tensor, StoredLayer], torch.Tensor]) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """The operator `qartsr::layer`, (input, layer's number) -> output, around the function that computes layers."""

    @torch.library.custom_op("qartsr::layer", mutates_args=())
    def operator(x: torch.Tensor, number: int) -> torch.Tensor:
        y = _in_order(run(x, _layers[number]))
        return y.clone() if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else y

    @operator.register_fake
    def _(x: torch.Tensor, number: int) -> torch.Tensor:
        return _in_order(x.new_empty(_layers[number].spec.output_shape(x.shape)))

    return operator
