"""Merges low-rank adapters, stored in peft's layout, into the weights of the model that they were trained on.

An adapter (LoRA, arXiv 2106.09685) adds scaling * B A to a weight. peft stores it beside the layer `L` as `L.lora_A.NAME.weight`
and `L.lora_B.NAME.weight`, and the layer's own tensors, where a checkpoint carries them, as `L.base_layer.weight` and `.bias`:

    linear        A (rank, in)              B (out, rank)
    convolution   A (rank, in, kh, kw)      B (out, rank, 1, 1)

A model may have several adapters; all are active, as they were in training.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from qartsr_pipeline.checkpoint_files import CheckpointError

# peft's default `lora_alpha` (in 0.9.0 as in 0.21), which OSEDiff's training code does not change: scaling = 8 / rank.
LORA_ALPHA = 8
_NAMED = 30  # at most so many keys of one kind are named in a message


@dataclass(frozen=True)
class Adapters:
    """The adapters that a checkpoint holds for one model.

    Attributes:
        label: the name of the checkpoint's state dict in messages.
        rank: of every adapter.
        layers: names of the adapted layers by the adapter's name.
        state: the tensors, by their keys in peft's layout.
        replaced: layers whose own weights the checkpoint must hold; it may hold those of no other layer. None: it may hold
            those of any layer and need not hold any.
    """

    label: str
    rank: int
    layers: dict[str, tuple[str, ...]]
    state: dict[str, torch.Tensor]
    replaced: tuple[str, ...] | None = ()


@dataclass(frozen=True)
class Merged:
    """The result of `merge`: the number of layers that had an adapter, and the names of tensors that were replaced as a whole."""

    layers: int
    replaced: tuple[str, ...]


@torch.no_grad()
def merge(model: nn.Module, adapters: Adapters) -> Merged:
    """Replaces whole tensors and adds every adapter to its layer's weight, in place and in float32.

    Args:
        model: has float32 weights; it is not changed if an error is raised.

    Raises:
        CheckpointError: keys are missing, left over or of another shape, or the model lacks layers; the message names them.
    """
    expected = _expected_shapes(model, adapters)
    own = _own_tensors(model, adapters)
    _check(adapters, expected | {key: model.state_dict()[name].shape for key, name in own.items()})
    tensors = model.state_dict()
    for key, name in own.items():
        tensors[name].copy_(adapters.state[key])
    for adapter, layers in adapters.layers.items():
        for layer in layers:
            weight = model.get_parameter(f"{layer}.weight")
            down, up = (adapters.state[f"{layer}.lora_{part}.{adapter}.weight"].float().flatten(1) for part in "AB")
            weight.add_((LORA_ALPHA / adapters.rank) * (up @ down).view(weight.shape))
    adapted = {layer for layers in adapters.layers.values() for layer in layers}
    return Merged(len(adapted), tuple(sorted(own.values())))


def _expected_shapes(model: nn.Module, adapters: Adapters) -> dict[str, torch.Size]:
    """The shape of every tensor of the adapters, by its key."""
    modules = dict(model.named_modules())
    names = sorted({layer for layers in adapters.layers.values() for layer in layers})
    unknown = [name for name in names if not isinstance(modules.get(name), (nn.Linear, nn.Conv2d))]
    if unknown:
        raise CheckpointError(
            f"{adapters.label} is for another base model: it adapts layers that the base does not have ({_listed(unknown)})."
            f" OSEDiff's checkpoint fits Stable Diffusion 2.1-base."
        )
    shapes = {}
    for adapter, layers in adapters.layers.items():
        for layer in layers:
            out, *rest = modules[layer].weight.shape
            ones = [1] * (len(rest) - 1)
            shapes[f"{layer}.lora_A.{adapter}.weight"] = torch.Size([adapters.rank, *rest])
            shapes[f"{layer}.lora_B.{adapter}.weight"] = torch.Size([out, adapters.rank, *ones])
    return shapes


def _own_tensors(model: nn.Module, adapters: Adapters) -> dict[str, str]:
    """Checkpoint key -> name in the model, for tensors of the model itself; required ones are listed even if they are missing."""
    names = model.state_dict().keys()
    if adapters.replaced is None:
        plain = {key: key.replace(".base_layer.", ".") for key in adapters.state}
        return {key: name for key, name in plain.items() if name in names}
    found = {}
    for name in names:
        layer, _, tensor = name.rpartition(".")
        if layer in adapters.replaced:
            under = f"{layer}.base_layer.{tensor}"  # where peft puts it once the layer has an adapter
            found[name if name in adapters.state else under] = name
    return found


def _check(adapters: Adapters, expected: dict[str, torch.Size]) -> None:
    state = adapters.state
    wrong = [
        f"{key}: {tuple(state[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    broken = [key for key in expected if key in state and not bool(torch.isfinite(state[key]).all())]
    problems = {
        "missing": [key for key in expected if key not in state],
        "not expected": [key for key in state if key not in expected],
        "wrongly shaped": wrong,
        "not finite": broken,
    }
    found = [f"{kind}: {_listed(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise CheckpointError(
            f"{adapters.label} does not fit the base. {'; '.join(found)}. Take the checkpoint as its authors published it,"
            f" and the base that it was trained on."
        )


def _listed(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more
