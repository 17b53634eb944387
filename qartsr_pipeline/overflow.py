"""Overflow in 16 bits: detected, repaired by running the stage again in a wider dtype, or reported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast
from weakref import WeakKeyDictionary

import torch
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from torch import nn

from qartsr_pipeline.calls import access_to, all_modules, alone_where_needed, registry_of_hooks
from qartsr_pipeline.kernels import watched_inputs
from qartsr_pipeline.quantization.deployed import DeployedLayer

logger = logging.getLogger(__name__)

# What to try instead of a 16-bit dtype, in order. bfloat16 has float32's range and float16's size, for when memory is short.
WIDER = {torch.float16: (torch.float32, torch.bfloat16), torch.bfloat16: (torch.float32,)}

# Processors without instructions for it need minutes for convolutions that take a second in float32.
TOO_SLOW = {("cpu", torch.float16)}


class OverflowMemory:
    """Which stages have overflowed in a 16-bit dtype, and the wider one they are run in since.

    Kept for each module, held weakly, and for the dtype it had: a module that takes the place of another, or that is cast, is
    tried in its own dtype again. A copy starts empty.
    """

    def __init__(self) -> None:
        self._wider: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], torch.dtype]] = WeakKeyDictionary()
        self.slow_ones: set[tuple[str, torch.dtype]] = set()  # of `TOO_SLOW`, those that were announced

    def wider_dtype(self, module: nn.Module, stage: str, dtype: torch.dtype) -> torch.dtype | None:
        """The dtype to run the module's stage in, if it has overflowed in `dtype`; None if not."""
        return self._wider.get(module, {}).get((stage, dtype))

    def remember(self, module: nn.Module, stage: str, dtype: torch.dtype, wider: torch.dtype) -> None:
        """Says so, unless another thread has found out at the same time."""
        known = self._wider.setdefault(module, {})
        if (stage, dtype) not in known:
            known[stage, dtype] = wider
            logger.warning(
                "Stage %r overflowed in %s and is run in %s from here on, which is slower.", stage, _short(dtype), _short(wider)
            )

    def announce_slow(self, device: str, dtype: torch.dtype, wider: torch.dtype) -> None:
        """Says once that another dtype is computed in."""
        if (device, dtype) not in self.slow_ones:
            self.slow_ones.add((device, dtype))
            logger.warning(
                "Computing in %s instead of %s, in which this device (%s) can be far slower. Load the pipeline with"
                " dtype=torch.%s (or torch.bfloat16) to save the conversion of the weights in every call.",
                *(_short(wider), _short(dtype), device, _short(wider)),
            )

    def __reduce__(self) -> tuple[type[OverflowMemory], tuple[()]]:
        return OverflowMemory, ()


def run_finite(
    name: str,
    stage: Callable[[torch.Tensor], torch.Tensor],
    module: nn.Module,
    x: torch.Tensor,
    overflows: OverflowMemory,
) -> torch.Tensor:
    """`stage(x)` in the module's dtype; in a wider one if it is not finite, and directly if that has happened before.

    Finite are the result and all inputs of quantized layers, which would hide NaN.

    Args:
        name: of the stage, for messages.
        stage: calls `module`.
        x: any float dtype, finite; it is cast to what the module computes in.
        overflows: the stages known to overflow; added to.

    Raises:
        FloatingPointError: not finite in a wider dtype either.
    """
    access = access_to(module)
    with alone_where_needed([module]), access.together():
        dtype = compute_dtype(module)
        known = overflows.wider_dtype(module, name, dtype)
        slow = known is None and (x.device.type, dtype) in TOO_SLOW
        if known is None and not slow:
            result = _finite(stage, x.to(dtype))
            if result is not None:
                return result
    wider = (known,) if known else WIDER.get(dtype, ())
    if slow:
        overflows.announce_slow(x.device.type, dtype, wider[0])
    tried = [dtype] if known is None and not slow else []
    for candidate in wider:
        try:
            with access.alone(), in_dtype(module, candidate):
                result = _finite(stage, x.to(candidate))
        except torch.OutOfMemoryError:
            if candidate == wider[-1]:
                raise
            continue
        tried.append(candidate)
        if result is not None:
            if candidate != known and not slow:
                overflows.remember(module, name, dtype, candidate)
            return result
    raise FloatingPointError(_not_finite(name, [_short(one) for one in tried]))


def _finite(stage: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor | None:
    """The stage's result, or None if it or the input of a quantized layer is not finite."""
    with watched_inputs() as inputs:
        result = stage(x)
    return result if inputs.all_finite() and bool(torch.isfinite(result).all()) else None


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What the module computes in: that of layerwise casting, or the dtype of its first floating parameter (or buffer).

    Eight bits are only stored, never computed in; and what diffusers keeps in float32 in any case says nothing.
    """
    for hook in _casting_hooks(module):
        return hook.compute_dtype
    kept = getattr(module, "_keep_in_fp32_modules", None) or ()
    tensors = (named for tensors in (module.named_parameters(), module.named_buffers()) for named in tensors)
    floating = ((name, t) for name, t in tensors if t.is_floating_point() and t.element_size() > 1)
    return next((t.dtype for name, t in floating if not any(part in name for part in kept)), torch.float32)


def _casting_hooks(module: nn.Module) -> Iterator[LayerwiseCastingHook]:
    for registry in (registry_of_hooks(one) for one in all_modules(module)):
        for hook in registry.hooks.values() if registry else ():
            if isinstance(hook, LayerwiseCastingHook):
                yield hook


@contextmanager
def in_dtype(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within this context the tensors that the module has in its own dtype have `dtype`; afterwards they are the same as before.
    Nobody else may use the module meanwhile, see `calls.Access`.

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
    hooks = [hook for hook in _casting_hooks(module) if hook.compute_dtype == own]
    try:
        for (_, _, tensor), values in zip(originals, data, strict=True):
            tensor.data = values.to(dtype)
        for hook in hooks:
            hook.compute_dtype = dtype
        yield
    finally:
        for hook in hooks:
            hook.compute_dtype = own
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
