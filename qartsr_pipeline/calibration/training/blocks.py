"""The modules that are quantized one after another: blocks in the order in which they run, and the turns that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers

NamesOf = Callable[[nn.Module], Iterable[str]]
LARGE = 200_000_000  # weights of calibrating layers from which their blocks run twice


@dataclass(frozen=True)
class Block:
    """A ResNet block, transformer block, sampler, or a layer outside of these, such as the first and the last.

    Attributes:
        name: component and qualified name, such as "unet.mid_block.resnets.0".
        part: one of its family's parts.
        layers: its calibrating layers.
    """

    name: str
    part: str
    module: nn.Module
    layers: tuple[CalibratingMixin, ...]

    def quantize(self, quantizing: bool) -> None:
        """Whether the block's layers simulate quantization, or compute what they did before."""
        for layer in self.layers:
            layer.quantizing = quantizing


def blocks_in_running_order(
    models: dict[str, nn.Module],
    kinds: tuple[type[nn.Module], ...],
    part_of: Callable[[str], str],
    run: Callable[[], object],
    names_of: NamesOf = calibrating_layers,
) -> list[Block]:
    """Every layer's block, in the order of the blocks' first calls.

    Args:
        models: component -> model.
        kinds: what a block is; a layer outside of these is a block of its own.
        part_of: block name -> part.
        run: runs the whole network once.
        names_of: names of a model's layers; others than calibrating ones are not among the `layers` of their blocks.

    Raises:
        ValueError: if a block is never called: it would never be calibrated.
    """
    candidates = {
        f"{component}.{name}": module
        for component, model in models.items()
        for name, module in _outermost(model, kinds, names_of).items()
    }
    called = _called_during(run, candidates)
    missing = candidates.keys() - set(called)
    if missing:
        raise ValueError(f"the blocks {', '.join(sorted(missing))} do not run: leave them out with keep: PATTERN: w16a16")
    return [Block(name, part_of(name), candidates[name], _layers(candidates[name])) for name in called]


def _outermost(model: nn.Module, kinds: tuple[type[nn.Module], ...], names_of: NamesOf) -> dict[str, nn.Module]:
    """Qualified name -> the outermost block around each layer, or the layer itself."""
    names = (outermost(model, name, kinds) for name in names_of(model))
    return {name: model.get_submodule(name) for name in names}


def outermost(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> str:
    """Qualified name of the outermost block around the layer of this name, or the layer's own."""
    parents = [".".join(name.split(".")[: depth + 1]) for depth in range(name.count("."))]
    return next((parent for parent in parents if isinstance(model.get_submodule(parent), kinds)), name)


def _layers(module: nn.Module) -> tuple[CalibratingMixin, ...]:
    return tuple(layer for layer in module.modules() if isinstance(layer, CalibratingMixin))


@torch.no_grad()
def _called_during(run: Callable[[], object], modules: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that ``run`` calls, in the order of their first calls."""
    called: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name)) for name, module in modules.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


@dataclass(frozen=True)
class Turn:
    """The blocks that are quantized and trained together, one after the other turn."""

    name: str
    blocks: tuple[Block, ...]


def distributed(count: int) -> list[int]:
    """0 .. count - 1 in such an order that the ones so far are spread evenly: the middle of the largest gap is next."""
    order: list[int] = []
    gaps = [(0, count)]
    while gaps:
        start, end = max(gaps, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        gaps.remove((start, end))
        middle = (start + end) // 2
        order.append(middle)
        gaps += [gap for gap in ((start, middle), (middle + 1, end)) if gap[0] < gap[1]]
    return order


def turns(blocks: list[Block], modules: str, order: str) -> list[Turn]:
    """The turns of a stage, in order.

    Args:
        blocks: in the order in which they run.
        modules, order: see `recipe.Stage`.
    """
    if modules == "all":
        return [Turn("all", tuple(blocks))]
    if modules == "parts":
        parts = dict.fromkeys(block.part for block in blocks)
        groups = [Turn(part, tuple(block for block in blocks if block.part == part)) for part in parts]
    else:
        groups = [Turn(block.name, (block,)) for block in blocks]
    if order == "distributed":
        return [groups[index] for index in distributed(len(groups))]
    return groups[::-1] if order == "reversed" else groups


@contextmanager
def recomputed(blocks: list[Block]) -> Iterator[None]:
    """Within, blocks of a large model run again during the backward pass, instead of keeping what they computed.

    A calibrating layer keeps some 17 bytes a weight for its gradient (weight, residual, codes, mask): for 866 million that is
    more than a GPU has.
    """
    large = sum(layer.weight.numel() for block in blocks for layer in block.layers) > LARGE
    chosen = blocks if large else []
    for block in chosen:
        block.module.forward = partial(checkpoint, block.module.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in chosen:
            del block.module.forward
