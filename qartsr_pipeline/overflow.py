"""Overflow in 16 bits: detected, repaired by running the stage again in a wider dtype, or reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from qartsr_pipeline.quantization.deployed import DeployedLayer

logger = logging.getLogger(__name__)

# What to try instead of a 16-bit dtype, in order. bfloat16 has float32's range and float16's size, for when memory is short.
WIDER = {torch.float16: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.float32,)}


class OverflowMemory:
    """Which stages have overflowed in a 16-bit dtype, and the wider one they are run in since.

    Kept for each module, held weakly, and for the dtype it had: a module that takes the place of another, or that is cast, is
    tried in its own dtype again. A copy starts empty.
    """

    def __init__(self) -> None:
        self._wider: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], torch.dtype]] = WeakKeyDictionary()

    def wider_dtype(self, module: nn.Module, stage: str, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype to run the module's stage in, if it has overflowed in `dtype`; None if not."""
        return self._wider.get(module, {}).get((stage, dtype))

    def remember(self, module: nn.Module, stage: str, dtype: torch.dtype, wider: torch.dtype) -> None:
        self._wider.setdefault(module, {})[stage, dtype] = wider

    def __reduce__(self) -> tuple[type[OverflowMemory], tuple[()]]:
        return OverflowMemory, ()


def run_finite(
    name: str,
    stage: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    x: torch.Tensor,
    overflows: OverflowMemory,
) -> torch.Tensor:
    """`stage(x)` in the module's dtype; in a wider one if the result is not finite, and directly if that has happened before.

    Args:
        name: of the stage, for messages.
        stage: calls `module`.
        x: any float dtype, finite; it is cast to what the module computes in.
        overflows: the stages known to overflow; added to.

    Raises:
        FloatingPointError: the result is not finite in a wider dtype either.
    """
    dtype = compute_dtype(module)
    known = overflows.wider_dtype(module, name, dtype)
    candidates = [known] if known else [dtype, *WIDER.get(dtype, ())]
    tried = []
    for candidate in candidates:
        try:
            with in_dtype(module, candidate):
                result = stage(x.to(candidate))
        except torch.OutOfMemoryError:
            if candidate in (dtype, candidates[-1]):
                raise
            continue
        tried.append(_short(candidate))
        if bool(torch.isfinite(result).all()):
            if candidate != known and candidate != dtype:
                logger.warning(
                    "Stage %r overflowed in %s and is run in %s from here on, which is slower.", name, tried[0], tried[-1]
                )
                overflows.remember(module, name, dtype, candidate)
            return result
    raise FloatingPointError(_not_finite(name, tried))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the module's first floating parameter (or buffer)."""
    tensors = (t for tensors in (module.parameters(), module.buffers()) for t in tensors)
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


@contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within this context the tensors that the module has in its own dtype have `dtype`; afterwards they are the same as before.

    `module.to(dtype)` would not do: quantized models refuse it, and casting back would round what had been float32 all along.
    Buffers of deployed layers keep their stored dtypes: their kernels compute in the dtype of the input.
    """
    own = compute_dtype(module)
    owners = [m for m in module.modules() if not isinstance(m, DeployedLayer)] if own != dtype else []
    tables = [table for m in owners for table in (cast("dict[str, torch.Tensor | None]", m._parameters), m._buffers)]
    originals = [
        (table, name, tensor)
        for table in tables
        for name, tensor in table.items()
        if tensor is not None and tensor.dtype == own and not tensor.is_meta
    ]
    data = [tensor.data for _, _, tensor in originals]
    try:
        for (_, _, tensor), values in zip(originals, data, strict=True):
            tensor.data = values.to(dtype)
        yield
    finally:
        # by name: an offload hook that ran in between has put other buffer objects there
        for (table, name, tensor), values in zip(originals, data, strict=True):
            current = table[name]
            tensor.data = values if current is None else values.to(current.device)
            table[name] = tensor


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_finite(name: str, tried: list[str]) -> str:
    return (
        f"The stage {name!r} gave NaN or infinity in {' and in '.join(tried)}. The weights are damaged, or the image drives "
        "the network out of its range. Ways out: load the pipeline anew from its folder (checksums are verified), load it with "
        "dtype=torch.float32 or torch.bfloat16, or try another image to see which of the two it is."
    )
