"""The table of backends and the choice among them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from qartsr_pipeline.kernels import int_mm, reference
from qartsr_pipeline.kernels.compiled import make_operator
from qartsr_pipeline.kernels.cpu import float_product, onednn
from qartsr_pipeline.kernels.layer_spec import LayerSpec, StoredLayer

logger = logging.getLogger(__name__)

BACKEND_VARIABLE = "QARTSR_BACKEND"
TRITON = "qartsr_pipeline.kernels.triton.backend"


def _triton() -> dict[str, ModuleType]:
    """The Triton backend where Triton can be imported: torch for CUDA brings it along, others do not."""
    if find_spec("triton") is None:
        return {}
    try:
        return {"triton": import_module(TRITON)}
    except (ImportError, OSError, RuntimeError) as error:  # a Triton that does not fit this torch or this driver
        logger.warning("The Triton kernels cannot be used: %s", error)
        return {}


# In order of preference.
BACKENDS: dict[str, ModuleType] = (
    {backend.NAME: backend for backend in (onednn, int_mm)}
    | _triton()
    | {backend.NAME: backend for backend in (float_product, reference)}
)

ONLY_WHEN_ASKED_FOR = {"triton"}  # until its kernels have run on a GPU, which `benchmarks/triton_gpu_check.py` is for

_forced: ContextVar[str | None] = ContextVar("qartsr_backend", default=None)


def list_backends() -> dict[str, str | None]:
    """Backend name -> None if it can run on this machine, otherwise the reason why not."""
    absent = {} if "triton" in BACKENDS else {"triton": "the package triton is not installed"}
    return absent | {name: backend.unavailable() for name, backend in BACKENDS.items()}


def forced_backend() -> str | None:
    """The name that `use_backend` or, outside of it, the variable QARTSR_BACKEND demands; None leaves the choice open.

    Raises:
        ValueError: for an unknown name.
    """
    name = _forced.get() or os.environ.get(BACKEND_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; there are {sorted(BACKENDS)}")
    return name


def choose_backend(spec: LayerSpec, device: str) -> ModuleType:
    """The backend that computes such a layer on a device of this type ("cpu", "cuda", ...).

    Raises:
        RuntimeError: if one is demanded that cannot; the message says why.
        ValueError: see `forced_backend`.
    """
    return BACKENDS[_choose(spec, device, forced_backend())]


@cache  # asking costs more than a small layer: CUDA for its capability, oneDNN for its operators
def _choose(spec: LayerSpec, device: str, forced: str | None) -> str:
    """The name of the backend; see `choose_backend`. What was refused is asked for again."""
    reasons: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if forced != name if forced else name in ONLY_WHEN_ASKED_FOR:
            continue
        reason = backend.unavailable() or backend.unsupported(spec, device)
        if reason is None:
            if name == reference.NAME and reasons:
                _announce_slow_fallback(device, reasons)
            return name
        reasons[name] = reason
    raise RuntimeError(
        f"no kernel backend can compute {spec} on {device} ({_listed(reasons)}). Leave the choice open, or use another device"
    )


def _listed(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _announce_slow_fallback(device: str, reasons: dict[str, str]) -> None:
    """Tells once that a layer is not computed by a backend that this device has."""
    here = {name: reason for name, reason in reasons.items() if _runs_on(BACKENDS[name], device)}
    if here:
        _announce(f"A layer is computed by the slow reference kernel on {device} ({_listed(here)}).")


def _runs_on(backend: ModuleType, device: str) -> bool:
    return backend.unavailable() is None and any(one.device == device for one in backend.CONSTRAINTS)


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
    if x.numel() == 0 or (x.requires_grad and torch.is_grad_enabled()):
        backend = reference  # the others have no gradient, and nothing to gain from an empty batch
    else:
        backend = choose_backend(layer.spec, x.device.type)
    if layer.spec.kind == "linear":
        return backend.linear(x, layer)
    return backend.conv2d(x, layer) if x.dim() == 4 else backend.conv2d(x[None], layer)[0]


_operator = make_operator(_run_layer)


def normalizing_backend(x: torch.Tensor, layer: StoredLayer) -> ModuleType | None:
    """The backend that computes the layer, if it can take a GroupNorm and SiLU before it into its own pass over x (B, C, H, W),
    otherwise None.
    """
    if torch.is_grad_enabled() or x.numel() == 0:
        return None
    backend = choose_backend(layer.spec, x.device.type)
    return backend if hasattr(backend, "norm_conv2d") else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within this context only the named backend is used.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"there is no backend {name!r}; there are {sorted(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
