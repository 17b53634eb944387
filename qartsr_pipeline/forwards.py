"""What runs around a module's own forward, or in place of it: hooks, and functions that one call has put there for itself.

Several threads may run the same modules. What one of them exchanges is exchanged in its own context only (`contextvars`, so also
in threads that it starts with a copy of its context): the others keep calling what the module had.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

SomeModule = TypeVar("SomeModule", bound=nn.Module)
Forward = Callable[..., torch.Tensor]

_NOTHING: Mapping[nn.Module, Forward] = MappingProxyType({})
_of_this_context: ContextVar[Mapping[nn.Module, Forward]] = ContextVar("qartsr_forwards", default=_NOTHING)
_installing = threading.Lock()


class ExchangedForward:
    """Stands in for a module's forward while any call has exchanged it, and looks up what this context calls instead.

    What a call has put there is kept in the call's context, not here.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self.before: Forward | None = module.__dict__.get(name)  # None: the forward of its class
        self.own: Forward = getattr(module, name)
        self.users: set[int] = set()

    @torch.compiler.disable  # a compiled graph must not keep what one call has put there
    def current(self) -> Forward:
        """What this context calls: its own function, or the module's."""
        return _of_this_context.get().get(self.module, self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.current()(*args, **kwargs)


@contextmanager
def exchanged_forwards(modules: Sequence[SomeModule], forward_of: Callable[[SomeModule], Forward]) -> Iterator[None]:
    """Within this context each module computes ``forward_of(module)`` instead of its own forward. Other threads see no change.

    Afterwards, even after an exception, a module has the attribute that it had before anybody exchanged it, or none.
    """
    exchanged: dict[nn.Module, Forward] = {module: forward_of(module) for module in modules}
    token = _of_this_context.set({**_of_this_context.get(), **exchanged})
    try:
        for module in exchanged:
            _install(module, id(exchanged))
        yield
    finally:
        _of_this_context.reset(token)
        for module in exchanged:
            _remove(module, id(exchanged))


def _install(module: nn.Module, user: int) -> None:
    with _installing:
        name = _forward_name(module)
        present = module.__dict__.get(name)
        if not isinstance(present, ExchangedForward):
            module.__dict__[name] = present = ExchangedForward(module, name)
        present.users.add(user)


def _remove(module: nn.Module, user: int) -> None:
    """Removes this user, if it is there; when the last one goes, the module's own forward is put back."""
    with _installing:
        present = module.__dict__.get(_forward_name(module))
        if not isinstance(present, ExchangedForward):
            return
        present.users.discard(user)
        if present.users:
            return
        if present.before is None:
            del module.__dict__[present.name]
        else:
            module.__dict__[present.name] = present.before


def _forward_name(module: nn.Module) -> str:
    """The attribute that holds a module's own forward. accelerate's sequential offloading puts a hook, which fetches the weights
    first, in the place of `forward` and keeps the original as `_old_forward`."""
    return "_old_forward" if "_hf_hook" in module.__dict__ else "forward"


def own_forward(module: nn.Module) -> Forward:
    """A module's forward without the hook of sequential offloading, as this context has it."""
    forward = getattr(module, _forward_name(module))
    return forward.current() if isinstance(forward, ExchangedForward) else forward


def other_forward(module: nn.Module) -> Forward | None:
    """The forward that this context finds on the module itself (offloading and exchanges put one there). None if it is only that
    of the class, which accelerate leaves there when it removes its hook.
    """
    forward = vars(module).get("forward")
    if isinstance(forward, ExchangedForward):
        forward = forward.current()
    is_its_class = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    return None if is_its_class else forward


def has_hooks(module: nn.Module) -> bool:
    """Whether torch calls anything before or after the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
