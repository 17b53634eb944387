"""Ranks of the low-rank branches under a budget of multiplications: where they remove most of the picture's error for their cost.

A layer's error e reaches the picture as J e, J being the Jacobian of the rest of the network. If errors of different positions
and channels are independent, E|J e|^2 = sum of diag(J^T J) e^2; with random signs v, E (J^T v)^2 = diag(J^T J) (Hutchinson),
which one backward pass gives for every layer at once. e is measured on the sample of the layer's input, for a few ranks, after
plain initialisation. Ranks are then raised step by step, steepest decrease of error for its multiplications first (our reading:
neither QArtSR nor SVDQuant says how ranks are chosen).

A layer whose branch gets the full rank runs in 16 bits in all but name; what that costs counts against the budget, and in every
count of bits and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, set_branch, squared_errors, weight_bounds
from qartsr_pipeline.calibration.start.observers import InputSample, as_rows
from qartsr_pipeline.calibration.start.other_grids import DynamicActivations
from qartsr_pipeline.calibration.training.progress import SILENT, Progress, follow
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, Kinds
from qartsr_pipeline.quantization.scheme import LayerScheme

RANKS = (4, 8, 16, 32, 64)
Layer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class RankedLayer:
    """A full-precision layer that gets a rank.

    Attributes:
        scheme: its bits, and the highest rank that it may get.
        sample: of its input.
    """

    layer: Layer
    scheme: LayerScheme
    sample: InputSample


@dataclass(frozen=True)
class RankBudget:
    """What all branches may cost, and how layers are quantized to find out what a branch is worth.

    Attributes:
        share: multiplications of all branches, as a share of the layers' own.
        kinds: classes of the calibrating linear and convolution layers.
        bounds: see `Initialisation`.
    """

    share: float
    kinds: Kinds
    bounds: str = "mse"


@dataclass(frozen=True)
class Sensitivity:
    """How one layer's errors reach the picture, averaged over pictures.

    Attributes:
        weights: (N,) the picture's sum of squared errors, for an error whose mean square is 1 in one output channel.
        inputs, outputs: positions that the layer reads and writes for one picture.
    """

    weights: torch.Tensor
    inputs: int
    outputs: int

    def multiplications(self, layer: Layer) -> int:
        """Of the layer itself."""
        return self.outputs * layer.weight.numel()

    def branch_multiplications(self, layer: Layer) -> int:
        """Of its branch, for each rank."""
        return self.inputs * layer.weight.shape[1] + self.outputs * layer.weight[:, 0].numel()


def sensitivities(
    layers: dict[str, Layer], run: Callable[[torch.Tensor], torch.Tensor], batches: Iterable[torch.Tensor], seed: int = 0
) -> dict[str, Sensitivity]:
    """One backward pass of random signs for every batch.

    Args:
        run: batch -> image (B, 3, H, W), differentiable; runs the layers.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}
    positions: dict[str, tuple[int, int]] = {}
    outputs: dict[str, torch.Tensor] = {}

    def watch(name: str, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        output.retain_grad()
        outputs[name] = output
        batch = len(inputs[0])
        positions[name] = len(as_rows(inputs[0])) // batch, len(as_rows(output)) // batch
        return output

    def hook_for(name: str) -> Callable[..., torch.Tensor]:
        return lambda module, inputs, output: watch(name, inputs, output)

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    count = 0
    try:
        for batch in batches:
            image = run(batch)
            signs = torch.randint(0, 2, image.shape, generator=generator).to(image) * 2 - 1
            (image * signs).sum().backward()
            for name, output in outputs.items():
                assert output.grad is not None  # retained by `watch`
                square = as_rows(output.grad).square().sum(0)
                sums[name] = sums[name] + square if name in sums else square
            outputs.clear()
            count += len(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Sensitivity(sums[name] / count, *positions[name]) for name in layers}


@torch.no_grad()
def errors_by_rank(ranked: RankedLayer, weights: torch.Tensor, budget: RankBudget) -> dict[int, float]:
    """Rank -> what the layer's error adds to the image's, for rank 0 and those of `RANKS` up to the scheme's.

    Args:
        weights: (N,), see `Sensitivity`.
    """
    layer, scheme, sample = ranked.layer, ranked.scheme, ranked.sample
    kind, options = budget.kinds[isinstance(layer, nn.Conv2d)], Initialisation(budget.bounds, smoothing=(0.5,))
    rows = sample.rows
    plain, widest = (kind.from_layer(layer, replace(scheme, rank=rank)) for rank in (0, scheme.rank_for(layer)))
    initialise({"layer": plain}, {"layer": sample}, options)
    copy_inputs(widest, plain, sample)
    set_branch(widest, rows, options)
    candidates = [plain, widest]
    for rank in (rank for rank in RANKS if rank < scheme.rank_for(layer)):
        candidate = kind.from_layer(layer, replace(scheme, rank=rank))
        copy_inputs(candidate, plain, sample)
        candidate.branch_up.copy_(widest.branch_up[:, :rank])
        candidate.branch_down.copy_(widest.branch_down[:rank])
        weight_bounds(candidate, rows, options)
        candidates.append(candidate)
    scores = ((candidate, squared_errors(candidate, rows) * weights) for candidate in candidates)
    return {candidate.layer_scheme.rank: float(errors.sum()) / len(rows) for candidate, errors in scores}


def copy_inputs(layer: CalibratingMixin, other: CalibratingMixin, sample: InputSample) -> None:
    """Smoothing and input bounds as those of another layer around the same weight."""
    for name in other._parameters:
        if name.startswith(("log_smooth", "input_")):
            layer.get_parameter(name).copy_(other.get_parameter(name))
    if isinstance(layer, DynamicActivations):
        layer.set_input_range(float(sample.extremes[0].min()))


def choose(errors: dict[str, dict[int, float]], costs: dict[str, int], budget: float) -> dict[str, int]:
    """The rank of every layer.

    Args:
        errors: layer -> rank -> the error that is left; 0 among the ranks.
        costs: layer -> cost of each rank.
        budget: that the costs add up to at most.
    """
    ranks = dict.fromkeys(errors, 0)
    while True:
        best, steepest = None, 0.0
        for name, left in errors.items():
            for rank, error in left.items():
                cost = (rank - ranks[name]) * costs[name]
                if 0 < cost <= budget and (left[ranks[name]] - error) / cost > steepest:
                    best, steepest = (name, rank, cost), (left[ranks[name]] - error) / cost
        if best is None:
            return ranks
        ranks[best[0]] = best[1]
        budget -= best[2]


def ranks_within_budget(
    layers: dict[str, RankedLayer],
    reach: dict[str, Sensitivity],
    budget: RankBudget,
    progress: Progress = SILENT,
) -> dict[str, int]:
    """The rank of every layer of a full-precision network, given the layers' sensitivities."""
    errors = {
        name: errors_by_rank(ranked, reach[name].weights, budget)
        for name, ranked in follow(progress, layers.items(), "choose ranks")
    }
    total = sum(reach[name].multiplications(ranked.layer) for name, ranked in layers.items())
    costs = {name: reach[name].branch_multiplications(ranked.layer) for name, ranked in layers.items()}
    return choose(errors, costs, budget.share * total)
