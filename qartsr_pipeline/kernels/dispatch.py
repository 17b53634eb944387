"""The table of backends and the choice among them."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from weakref import WeakValueDictionary

import torch

from qartsr_pipeline.kernels.backend import Backend, NormFusion
from qartsr_pipeline.kernels.cpu import FloatProduct, OneDNN
from qartsr_pipeline.kernels.finite import note_input
from qartsr_pipeline.kernels.int_mm import IntMM
from qartsr_pipeline.kernels.reference import Reference
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.triton.backend import Triton
from qartsr_pipeline.kernels.winograd import Winograd

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "QARTSR_BACKEND"
REFERENCE = Reference()

# In order of preference, the fastest first.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Winograd(), OneDNN(), IntMM(), Triton(), FloatProduct(), REFERENCE)
}

_forced: ContextVar[str | None] = ContextVar("qartsr_backend", default=None)
_numbers = itertools.count()
_layers: WeakValueDictionary[int, StoredLayer] = WeakValueDictionary()


def list_backends() -> dict[str, str | None]:
    """The backends that compute quantized layers, the fastest first.

    Returns:
        Backend name -> None if it can run on this machine, otherwise the reason why not.

    Example:
        >>> from qartsr_pipeline import list_backends
        >>> list_backends()["reference"] is None  # it runs everywhere
        True
    """
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context only the named backend is used. It overrides the environment variable QARTSR_BACKEND.

    A layer that the backend cannot compute raises RuntimeError with the reason; nothing else takes its place.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> from qartsr_pipeline import use_backend
        >>> with use_backend("reference"):
        ...     pass  # quantized layers that are called here run on the reference backend
    """
    token = _forced.set(_known(name))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """The name that `use_backend` or, outside of it, the variable QARTSR_BACKEND demands; None leaves the choice open.

    Raises:
        ValueError: for an unknown name.
    """
    name = _forced.get() or os.environ.get(BACKEND_VARIABLE) or None
    return None if name is None else _known(name)


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; there are {sorted(BACKENDS)}")
    return name


def choose_backend(spec: LayerSpec, device: str) -> Backend:
    """The backend that computes such a layer on a device of this type ("cpu", "cuda", ...).

    Raises:
        RuntimeError: if one is demanded that cannot; the message says why.
        ValueError: see `forced_backend`.
    """
    return BACKENDS[_choose(spec, device, forced_backend())]


@cache  # asking costs more than a small layer: CUDA for its capability, oneDNN for its operators
def _choose(spec: LayerSpec, device: str, forced: str | None) -> str:
    """The name of the backend; see `choose_backend`. Errors are not remembered: the next call asks again."""
    reasons: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if forced != name if forced else not backend.preferred_for(spec):
            continue
        reason = backend.unavailable() or backend.unsupported(spec, device)
        if reason is None:
            _announce_fallback(spec, device, name, reasons)
            return name
        reasons[name] = reason
    raise RuntimeError(
        f"no kernel backend can compute {spec} on {device} ({_listed(reasons)}). Leave the choice open, or use another device"
    )


def _listed(reasons: dict[str, str]) -> str:
    """Backend name -> reason, as text; backends with the same reason stand together."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(backends)}: {reason}" for reason, backends in names.items())


def _announce_fallback(spec: LayerSpec, device: str, chosen: str, reasons: dict[str, str]) -> None:
    """Warns once if a faster backend runs on this device, but not for such a layer."""
    here = {name: reason for name, reason in reasons.items() if _runs_on(BACKENDS[name], device)}
    if here:
        kind = "Linear layers" if spec.kind == "linear" else "Convolutions"
        bits = f"W{spec.weight_bits}A{spec.activation_bits}"
        _announce(f"{kind} at {bits} run on the slower {chosen!r} kernels on {device} ({_listed(here)}).")


def _runs_on(backend: Backend, device: str) -> bool:
    return backend.unavailable() is None and any(one.device == device for one in backend.constraints)


@cache
def _announce(message: str) -> None:
    logger.warning(message)


def run_layer(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    """The output of a deployed layer, from the backend chosen for it; within `torch.compile` as one operator without gradient.

    Args:
        x: (..., C) for a linear layer, (B, C, H, W) or (C, H, W) for a convolution; any float dtype, any strides, empty too.

    Returns:
        (..., N) or (B, N, H', W') or (N, H', W'), in x's dtype.
    """
    if torch.compiler.is_compiling():
        return _operator(x, layer.number)
    return _run_layer(x, layer)


def _run_layer(x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
    if layer.spec.hides_what_is_not_finite:
        note_input(x)
    backend: Backend = REFERENCE  # the others have no gradient, and nothing to gain from an empty batch
    if x.numel() and not (x.requires_grad and torch.is_grad_enabled()):
        backend = choose_backend(layer.spec, x.device.type)
    if layer.spec.kind == "linear":
        return backend.linear(x, layer)
    return backend.conv2d(x, layer) if x.dim() == 4 else backend.conv2d(x[None], layer)[0]


def norm_fusion(x: torch.Tensor, layer: StoredLayer) -> NormFusion | None:
    """What takes a GroupNorm and SiLU before the layer into its own pass over x (B, C, H, W); None if its backend cannot."""
    if torch.is_grad_enabled() or x.numel() == 0:
        return None
    return choose_backend(layer.spec, x.device.type).norm_fusion()


# `torch.compile` sees a deployed layer as one operator, whose inside it does not trace. Its arguments are the input and the
# layer's number; everything else is looked up when it runs. Which backend computes the layer, what that prepared, and operators
# that only some builds of torch have thus stay out of the graph, which has no break.


def register(layer: StoredLayer) -> int:
    """A number for the layer, of its own, as long as it lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def _in_order(y: torch.Tensor) -> torch.Tensor:
    """Backends differ in the memory format they return; a graph needs one. Maps are channels-last."""
    return y.contiguous(memory_format=torch.channels_last if y.dim() == 4 else torch.contiguous_format)


@torch.library.custom_op("qartsr::layer", mutates_args=())
def _operator(x: torch.Tensor, number: int) -> torch.Tensor:
    y = _in_order(_run_layer(x, _layers[number]))
    return y.clone() if y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else y


@_operator.register_fake
def _(x: torch.Tensor, number: int) -> torch.Tensor:
    # int: for the second layer that a graph is compiled for, PyTorch 2.6 has a symbol in the place of the number
    return _in_order(x.new_empty(_layers[int(number)].spec.output_shape(x.shape)))
