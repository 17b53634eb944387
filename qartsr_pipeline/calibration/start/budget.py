"""Bits and ranks of every layer under a budget of bytes and multiplications: where they lower the image's error most.

Each layer can be quantized in several ways: at the stated bits, with activations of 8 bits (kernels carry bytes, so these take
no more time), or with all of 8 bits and then without a branch. The others may have branches of a few ranks, none of which costs
more than half the multiplications of the layer itself. For each way the layer is set up as for calibration, its branch fitted,
and the error of its outputs measured, weighted by how errors there reach the image (`ranks.sensitivities`) if those of different
positions are independent. They are not where few bits shift whole areas, as in the first blocks at full resolution: so the
network is also run with each layer alone at the stated bits (each block, of a large network), and what the image really loses
corrects the layer's other errors.

The least total error under the limits is a knapsack with several sizes. It is approached greedily: the change of one layer that
lowers the error most for its cost, again and again. The cost is a weighted sum of what it takes of each limit, and the best of
several weightings is kept (our reading: the papers say nothing about it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from torch import nn

from qartsr_pipeline.calibration.recipe_layers import Layer
from qartsr_pipeline.calibration.start.branches import branch_from_weight, fit_branch
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, squared_errors, weight_bounds
from qartsr_pipeline.calibration.start.ranks import RankedLayer, copy_inputs
from qartsr_pipeline.quantization.accounting import Work, stored_bytes
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import deployed_like
from qartsr_pipeline.quantization.scheme import LayerScheme

RANKS, RANK_WIDER = (4, 8, 16, 32), (8,)  # tried at the stated bits, and at others
WEIGHTINGS = tuple(product((0.25, 1.0, 4.0), repeat=3))
MOST_CORRECTION = 100.0
MeasuredWith = Callable[[dict[str, nn.Module]], float]
HEADER = stored_bytes({})


@dataclass(frozen=True)
class Choice:
    """One way to quantize a layer.

    Attributes:
        error: what it adds to the image's sum of squared errors.
        size: bytes in the file.
        branch, wider: multiplications of its branch, and of the layer itself where its bits are not the stated ones.
    """

    scheme: LayerScheme
    error: float
    size: int
    branch: int
    wider: int


@dataclass(frozen=True)
class LayerErrors:
    """What the error of one layer adds to the image's, predicted.

    Attributes:
        errors: of every way to quantize the layer.
        layer: quantized at the stated bits, without a branch.
        stated: the way that this is.
    """

    errors: dict[LayerScheme, float]
    layer: CalibratingMixin
    stated: LayerScheme


@dataclass(frozen=True)
class Limits:
    """What all layers of a choice may take together: bytes, and multiplications; infinite where there is no limit."""

    size: float
    branch: float
    wider: float


@dataclass(frozen=True)
class Assignment:
    """A scheme for every layer.

    Attributes:
        error: the sum over the layers; what is predicted for the image.
        size: bytes.
        curve: bytes (or bits a weight) and error of everything on the way, from nothing but the stated bits to this, for a plot.
    """

    schemes: dict[str, LayerScheme]
    error: float
    size: int
    curve: list[tuple[float, float]]


def ways(stated: LayerScheme, layer: nn.Linear | nn.Conv2d) -> list[LayerScheme]:
    """The ways to quantize a layer, the stated one, without a branch, first.

    Args:
        stated: the stated bits, and the highest rank.
    """
    weights, activations = stated.weight_bits, stated.activation_bits
    more = max(activations, 8)
    pairs = [(weights, activations), (weights, more), (max(weights, 4), more), (max(weights, 8), more)]
    outputs, taps = layer.weight.shape[0], layer.weight[0, 0].numel()
    inputs = layer.weight.shape[1]
    found = []
    for pair in dict.fromkeys(pairs):
        tried = RANKS if pair == pairs[0] else () if pair[0] >= 8 else RANK_WIDER
        ranks = [0, *(rank for rank in tried if rank <= stated.rank)]
        found += [
            replace(stated, weight_bits=pair[0], activation_bits=pair[1], rank=rank)
            for rank in ranks
            if rank * (inputs + outputs * taps) < inputs * outputs * taps / 2
        ]
    return found


@torch.no_grad()
def errors_of_ways(ranked: RankedLayer, weights: torch.Tensor, kind: type[CalibratingMixin], recipe: Layer) -> LayerErrors:
    """What the layer's error adds to the image's; branches are fitted where the recipe says so and that helps.

    Args:
        weights: (N,), see `ranks.Sensitivity`.
        kind: class of the calibrating layer.
    """
    layer, sample = ranked.layer, ranked.sample
    options = Initialisation(recipe.bounds, recipe.percentile, smoothing=(0.5,))
    rows = sample.rows
    plain: dict[tuple[int, int], CalibratingMixin] = {}
    errors: dict[LayerScheme, float] = {}

    def error(candidate: CalibratingMixin) -> float:
        return float((squared_errors(candidate, rows) * weights).sum()) / len(rows)

    for scheme in ways(ranked.scheme, layer):
        bits = scheme.weight_bits, scheme.activation_bits
        candidate = kind.from_layer(layer, scheme, recipe.adapter_rank if scheme.rank else 0)
        if not scheme.rank:
            initialise({"layer": candidate}, {"layer": sample}, options)
            plain[bits] = candidate
            errors[scheme] = error(candidate)
            continue
        copy_inputs(candidate, plain[bits], sample)
        branch_from_weight(candidate)
        weight_bounds(candidate, rows, options)
        errors[scheme] = error(candidate)
        if recipe.branch_fit:
            fit_branch(candidate, rows)
            errors[scheme] = min(errors[scheme], error(candidate))
    stated = replace(ranked.scheme, rank=0)
    return LayerErrors(errors, plain[stated.weight_bits, stated.activation_bits], stated)


def corrected(found: dict[str, LayerErrors], measured: MeasuredWith) -> dict[str, dict[LayerScheme, float]]:
    """Layer -> way -> error, for layers that are measured together, by what the image really loses with all of them at the stated
    bits; those with finer activations shift nothing.

    Args:
        measured: the image's real sum of squared errors with other layers in the place of those of these names.
    """
    coarse = {name: each for name, each in found.items() if each.stated.activation_bits < 8 and each.errors[each.stated] > 0}
    correction = 1.0
    if coarse:
        predicted = sum(each.errors[each.stated] for each in coarse.values())
        real = measured({name: each.layer for name, each in coarse.items()})
        correction = min(max(real / predicted, 1 / MOST_CORRECTION), MOST_CORRECTION)
    return {
        name: {way: error * (correction if way.activation_bits < 8 else 1) for way, error in each.errors.items()}
        for name, each in found.items()
    }


def choices_of(
    name: str, ranked: RankedLayer, errors: dict[LayerScheme, float], work: Work, stated: tuple[int, int]
) -> list[Choice]:
    """The ways of a layer, with what they cost."""
    layer = ranked.layer
    positions, weights = work.layers[name]
    path = name.partition(".")[2]
    per_rank = positions.branch_multiplications(layer.weight.shape[0], layer.weight.shape[1], layer.weight[0, 0].numel())
    found = []
    for scheme, error in errors.items():
        buffers = deployed_like(layer, scheme, "meta").named_buffers()
        tensors = {f"{path}.{buffer}": tensor for buffer, tensor in buffers}
        size = stored_bytes(tensors, behind=work.parameters) - HEADER  # offsets of about the length that they will have
        own = positions.multiplications(weights) if (scheme.weight_bits, scheme.activation_bits) != stated else 0
        found.append(Choice(scheme, error, size, scheme.rank * per_rank, own))
    return found


def assign(choices: dict[str, list[Choice]], limits: Limits) -> Assignment:
    """The choice for every layer that leaves the least error of those tried.

    Args:
        choices: layer -> at least one; the first are what everything starts from.

    Raises:
        ValueError: even the first choices are above a limit.
    """
    names, width = list(choices), max(map(len, choices.values()))
    padded = [row + [row[0]] * (width - len(row)) for row in choices.values()]
    error = np.array([[each.error for each in row] for row in padded])
    costs = np.array([[(each.size, each.branch, each.wider) for each in row] for row in padded], dtype=np.float64)
    room = np.array([limits.size, limits.branch, limits.wider]) - costs[:, 0].sum(0)
    if room.min() < 0:
        raise ValueError(f"the first choices take {costs[:, 0].sum(0)}, more than {limits}")
    best: tuple[float, np.ndarray, list[tuple[float, float]]] | None = None
    for weighting in WEIGHTINGS:
        chosen, curve = _greedy(error, costs, room, np.array(weighting) / np.maximum(room, 1))
        left = float(np.take_along_axis(error, chosen[:, None], 1).sum())
        if best is None or left < best[0]:
            best = left, chosen, curve
    assert best is not None
    left, chosen, curve = best
    schemes = {name: padded[row][index].scheme for row, (name, index) in enumerate(zip(names, chosen, strict=True))}
    return Assignment(schemes, left, int(curve[-1][0]), curve)


def _greedy(
    error: np.ndarray, costs: np.ndarray, room: np.ndarray, prices: np.ndarray
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Index of each layer's choice, and size and error after every change.

    Args:
        error: (layers, choices). costs: (layers, choices, resources). room, prices: (resources,).
    """
    layers = np.arange(len(error))
    chosen, used = np.zeros(len(error), dtype=int), np.zeros(costs.shape[2])
    start = costs[:, 0, 0].sum()
    curve: list[tuple[float, float]] = [(int(start), float(error[:, 0].sum()))]
    while True:
        gain = error[layers, chosen][:, None] - error  # (layers, choices)
        change = costs - costs[layers, chosen][:, None]
        fits = (used + change <= room).all(2) & (gain > 0)
        if not fits.any():
            return chosen, curve
        price = np.maximum((change * prices).sum(2), 1e-9)  # what also saves is taken at once
        steepness = np.where(fits, gain / price, -1.0)
        layer, choice = np.unravel_index(int(steepness.argmax()), steepness.shape)
        used += change[layer, choice]
        chosen[layer] = choice
        curve.append((int(start + used[0]), float(error[layers, chosen].sum())))
