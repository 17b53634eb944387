"""16-bit overflow: noticed, repaired by running the stage once more in a wider dtype, or reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qartsr_pipeline.quantization.deployed import DeployedLayer

logger = logging.getLogger(__name__)

# What to try instead of a 16-bit dtype, in order. bfloat16 has float32's range and float16's size, for when memory is short.
WIDER = {torch.float16: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.float32,)}


def run_finite(
    name: str,
    stage: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    x: torch.Tensor,
    wide_stages: dict[str, torch.dtype],
) -> torch.Tensor:
    """`stage(x)` in the module's dtype; in a wider one when that gives a value that is not finite, and directly if it once did.

    Args:
        name: of the stage, for messages.
        stage: calls `module`.
        x: any float dtype, finite; it is cast to what the module computes in.
        wide_stages: the dtype in which stages known to overflow are run; added to.

    Raises:
        FloatingPointError: the result is not finite in a wider dtype either.
    """
    dtype = compute_dtype(module)
    candidates = [wide_stages[name]] if name in wide_stages else [dtype, *WIDER.get(dtype, ())]
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
            if candidate != dtype and name not in wide_stages:
                logger.warning(
                    "Stage %r overflowed in %s and is run in %s from here on, which is slower.", name, tried[0], tried[-1]
                )
                wide_stages[name] = candidate
            return result
    raise FloatingPointError(_complaint(name, tried))


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Dtype of the module's first floating parameter (or buffer)."""
    tensors = (t for tensors in (module.parameters(), module.buffers()) for t in tensors)
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)


@contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, what the module had in its own dtype has `dtype`; afterwards these are the very same tensors as before.

    `module.to(dtype)` would not do: quantized models refuse it, and casting back would round what had been float32 all along.
    Buffers of deployed layers keep their stored dtypes: their kernels compute in the dtype of what comes in.
    """
    own = compute_dtype(module)
    owners = [m for m in module.modules() if not isinstance(m, DeployedLayer)] if own != dtype else []
    slots = [(tensors, name) for m in owners for tensors in (m._parameters, m._buffers) for name in tensors]
    originals = [(tensors, name, tensors[name]) for tensors, name in slots if _is_of(tensors[name], own)]
    data = [tensor.data for _, _, tensor in originals]
    try:
        for (_, _, tensor), values in zip(originals, data, strict=True):
            tensor.data = values.to(dtype)
        yield
    finally:
        # by slot: an offload hook that ran in between has put other buffer objects there
        for (tensors, name, tensor), values in zip(originals, data, strict=True):
            device = tensors[name].device
            tensor.data = values.to(device)
            tensors[name] = tensor


def _is_of(tensor: torch.Tensor | None, dtype: torch.dtype) -> bool:
    return tensor is not None and tensor.dtype == dtype and not tensor.is_meta


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _complaint(name: str, tried: list[str]) -> str:
    return (
        f"The stage {name!r} gave NaN or infinity in {' and in '.join(tried)}. The weights are damaged, or the picture drives "
        "the network out of its range. Ways out: load the pipeline anew from its folder (checksums are verified), load it with "
        "dtype=torch.float32 or torch.bfloat16, or try another picture to see which of the two it is."
    )
