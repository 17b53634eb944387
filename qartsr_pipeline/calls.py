"""Several calls at once: what each has of its own, and when one of them needs a module to itself.

A call writes nothing into the modules that it runs, so any number of calls may run them. Two things do change a module: hooks of
accelerate and diffusers that move or cast weights around every call of a layer, and a stage that is repeated in a wider dtype.
They wait until nobody else uses it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import HookRegistry
from torch import nn
from tqdm import tqdm

from qartsr_pipeline.image.tiles import Tile, TileGrid
from qartsr_pipeline.input_checks import CallArguments, replaced_tensors


class Access:
    """Who uses a module: several threads together, or one alone, which may enter again, either way."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._together: Counter[int] = Counter()  # by thread
        self._alone: int | None = None
        self._depth = self._waiting = 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits while another thread uses the module alone, or is waiting to."""
        me = threading.get_ident()
        with self._changed:
            if self._alone != me and not self._together[me]:
                self._changed.wait_for(lambda: self._alone is None and not self._waiting)
            self._together[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._together[me] -= 1
                self._together = +self._together
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other thread uses the module."""
        me = threading.get_ident()
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: self._alone in (None, me) and not set(+self._together) - {me})
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._alone, self._depth = me, self._depth + 1
        try:
            yield
        finally:
            with self._changed:
                self._depth -= 1
                self._alone = me if self._depth else None
                self._changed.notify_all()


_of_modules: WeakKeyDictionary[nn.Module, Access] = WeakKeyDictionary()
_looking = threading.Lock()


def access_to(module: nn.Module) -> Access:
    """The module's own `Access`, the same for all pipelines that share the module."""
    with _looking:
        return _of_modules.setdefault(module, Access())


class Turn:
    """A call's use of modules, alone; or of no modules, where it may share them.

    Attributes:
        held: False while `paused`, and after an interruption that ended the waiting at its end.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules, self.held = modules, False
        self._stack = ExitStack()

    def take(self) -> None:
        """Waits until nobody else uses the modules."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(access_to(module).alone())
            self._stack, self.held = stack.pop_all(), True

    def end(self) -> None:
        self.held = False
        self._stack.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within this context others may use the modules. For code of the user's: it may wait for another call, which waits for
        this one.
        """
        self.end()
        try:
            yield
        finally:
            self.take()


@contextmanager
def alone_where_needed(modules: Iterable[nn.Module]) -> Iterator[Turn]:
    """Within this context nobody else uses these modules, if running changes one of them. All are taken, because offloaded ones
    make room for each other.
    """
    modules = sorted(modules, key=id)  # everybody in one order, so that no two wait for each other
    with ExitStack() as stack:
        for module in modules:  # a call that ends takes the hooks of offloading off for a moment
            stack.enter_context(access_to(module).together())
        changed = any(is_changed_by_running(module) for module in modules)
    turn = Turn(modules if changed else ())
    turn.take()
    try:
        yield turn
    finally:
        turn.end()


def is_changed_by_running(module: nn.Module) -> bool:
    """Whether hooks move or cast the module's tensors when it is called: offloading, layerwise casting."""
    return any("_hf_hook" in vars(one) or registry_of_hooks(one) is not None for one in all_modules(module))


def all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Like `module.modules()`, in the same order. That one also makes their names, and is several times as slow: for a network
    that is asked this in every call, a tenth of the time of a small image.
    """
    waiting: list[nn.Module | None] = [module]
    seen: set[nn.Module] = set()
    while waiting:
        one = waiting.pop()
        if one is not None and one not in seen:
            seen.add(one)
            yield one
            waiting.extend(reversed(one._modules.values()))


def registry_of_hooks(module: nn.Module) -> HookRegistry | None:
    """diffusers' hooks on this one module, None if there are none."""
    registry = vars(module).get("_diffusers_hook")
    return registry if isinstance(registry, HookRegistry) and registry.hooks else None


@dataclass(eq=False)  # two calls are never the same one
class Call:
    """What a call of the pipeline shows to its callback.

    Attributes:
        steps: how many tiles it has.
        tile: the last one that was finished, and its grid.
        interrupted: the remaining tiles are not computed.
        running: False once the call has ended.
    """

    steps: int = 1
    tile: tuple[Tile, TileGrid] | None = None
    interrupted: bool = False
    running: bool = True


class Calls:
    """The calls of one pipeline; a copy of it has none."""

    def __init__(self) -> None:
        self._of_thread = threading.local()
        self._running: list[Call] = []
        self._latest = Call(running=False)

    def __reduce__(self) -> tuple[type[Calls], tuple[()]]:
        return Calls, ()

    def current(self) -> Call:
        """This thread's call, or its last one; in a thread that made none, the call that began last in any thread."""
        return vars(self._of_thread).get("call", self._latest)

    @contextmanager
    def begin(self, steps: int) -> Iterator[Call]:
        """A call of this thread, which ends with the context."""
        outer, call = vars(self._of_thread).get("call"), Call(steps)
        self._of_thread.call = self._latest = call
        self._running.append(call)
        try:
            yield call
        finally:
            call.running = False
            self._running.remove(call)
            if outer is not None and outer.running:  # a callback that calls the pipeline
                self._of_thread.call = outer

    def interrupt(self, interrupted: bool) -> None:
        """Sets it for this thread's call if one runs, as in a callback; otherwise for all that run, as from a button."""
        own = vars(self._of_thread).get("call")
        for call in [own] if own is not None and own.running else list(self._running):
            call.interrupted = interrupted


class TileReporter:
    """Reports every finished tile of a call to the progress bar and to the user's callback.

    While the callback runs, other threads may use the pipeline: it may call another one, whose callback calls this one.
    """

    def __init__(self, pipeline: DiffusionPipeline, call: Call, bar: tqdm, arguments: CallArguments, turn: Turn):
        self.pipeline, self.call, self.bar, self.turn = pipeline, call, bar, turn
        self.callback, self.names = arguments.callback_on_step_end, arguments.callback_on_step_end_tensor_inputs or ()
        self.step = 0

    def __call__(self, tensors: dict[str, torch.Tensor], tile: Tile, grid: TileGrid) -> dict[str, torch.Tensor]:
        """Returns `tensors`, those of one tile of the grid, as the callback leaves them."""
        self.call.tile = (tile, grid)
        if self.callback is not None:
            chosen = {name: tensors[name] for name in self.names if name in tensors}
            with self.turn.paused():
                returned = self.callback(self.pipeline, self.step, self.pipeline.config["timestep"], chosen)
            tensors = replaced_tensors(tensors, returned)
        self.step += 1
        self.bar.update()
        return tensors
