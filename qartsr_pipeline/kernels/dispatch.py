"""The table of backends and the choice among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from qartsr_pipeline.kernels import reference
from qartsr_pipeline.kernels.layer_spec import LayerSpec

BACKENDS: dict[str, ModuleType] = {reference.NAME: reference}  # in order of preference

_forced: ContextVar[str | None] = ContextVar("qartsr_backend", default=None)


def list_backends() -> dict[str, str | None]:
    """Backend name -> None if it can run on this machine, otherwise the reason why not."""
    return {name: backend.unavailable() for name, backend in BACKENDS.items()}


def choose_backend(spec: LayerSpec, device: str) -> ModuleType:
    """The backend that computes such a layer on a device of this type ("cpu", "cuda", ...).

    Raises:
        RuntimeError: if `use_backend` demands one that cannot; the message says why.
    """
    forced = _forced.get()
    reasons = {}
    for name, backend in BACKENDS.items():
        if forced in (None, name):
            reasons[name] = backend.unavailable() or backend.unsupported(spec, device)
            if reasons[name] is None:
                return backend
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"no kernel backend can compute {spec} on {device} ({why}). Leave the choice open, or use another device")


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
