"""Cancels within a tile: ComfyUI's cancel button is checked before every block of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def interruptible(network: nn.Module) -> Iterator[None]:
    """While it is open, `network` raises ComfyUI's InterruptProcessingException at its next block once the user cancels.

    Single layers get no hook, because a layer with a hook is not fused with its neighbours.
    """
    from comfy.model_management import throw_exception_if_processing_interrupted

    def look(module: nn.Module, inputs: tuple) -> None:
        throw_exception_if_processing_interrupted()

    hooks = [module.register_forward_pre_hook(look) for module in network.modules() if any(module.children())]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def interruptible_unless(busy: Callable[[], bool]) -> Iterator[None]:
    """The same for every network, including those that are built later, except while `busy` returns True."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    def look(module: nn.Module, inputs: tuple) -> None:
        if not busy():
            throw_exception_if_processing_interrupted()

    hook = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()
