"""The rows of a comparison: published methods, and the main one with something left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from qartsr_pipeline.calibration.recipe import Budget, Recipe, Stage
from qartsr_pipeline.calibration.recipe_files import load_recipe

METHODS = ("maxmin", "lsq", "q_dm", "efficientdm", "passionsr", "svdquant", "qartsr")
MAIN = "qartsr"
EXTRA_BITS = {"passionsr": "w8a8"}  # what its publication is about


def _without(recipe: Recipe, part: str, **layer: Any) -> Recipe:
    """The recipe without one kind of parameter."""

    def changed(stage: Stage) -> Stage:
        rates = {name: rate for name, rate in stage.rates.items() if name != part}
        return replace(stage, train=tuple(p for p in stage.train if p != part), rates=rates)

    stages = (changed(stage) for stage in recipe.stages)
    return replace(recipe, layer=replace(recipe.layer, **layer), stages=tuple(s for s in stages if s.train))


def _per_module(recipe: Recipe, change: Callable[[Stage], Stage]) -> Recipe:
    """The recipe with its per-module stages changed."""
    return replace(recipe, stages=tuple(s if s.modules == "all" else change(s) for s in recipe.stages))


def _with_layer(recipe: Recipe, **changes: Any) -> Recipe:
    return replace(recipe, layer=replace(recipe.layer, **changes))


def _with_shares(recipe: Recipe, per_module: float) -> Recipe:
    """The recipe with that share of its steps for the stage that trains modules one after another."""
    shares = (per_module if stage.modules != "all" else 1 - per_module for stage in recipe.stages)
    return replace(recipe, stages=tuple(replace(s, share=share) for s, share in zip(recipe.stages, shares, strict=True)))


# Name on the command line -> label in tables, and what is changed of the main recipe.
ABLATIONS: dict[str, tuple[str, Callable[[Recipe], Recipe]]] = {
    "qartsr-start": ("no training", lambda recipe: replace(recipe, steps=0)),
    "qartsr-rpq": ("RPQ before ET", partial(_with_shares, per_module=0.3)),
    "qartsr-forward": (
        "RPQ before ET, forward order",
        lambda recipe: _per_module(_with_shares(recipe, 0.3), lambda stage: replace(stage, order="forward")),
    ),
    "qartsr-no-et": ("RPQ instead of ET", partial(_with_shares, per_module=1.0)),
    "qartsr-one-rate": (
        "one learning rate",
        lambda recipe: replace(recipe, stages=tuple(replace(stage, rates={}) for stage in recipe.stages)),
    ),
    "qartsr-one-rank": ("rank 8 everywhere", lambda recipe: replace(_with_layer(recipe, branch_rank=8), budget=Budget())),
    "qartsr-no-branch": ("no branch", partial(_without, part="branch", branch_rank=0, branch_fit=False)),
    "qartsr-no-smoothing": ("no smoothing", partial(_without, part="smoothing", smoothing="none")),
    "qartsr-no-adapter": ("no adapter", partial(_without, part="adapter", adapter_rank=0, rounding="nearest")),
    "qartsr-nearest": ("weights rounded one by one", lambda recipe: _with_layer(recipe, rounding="nearest")),
    "qartsr-no-bias": ("biases not trained", partial(_without, part="bias")),
    "qartsr-no-fit": ("branch not fitted", lambda recipe: _with_layer(recipe, branch_fit=False)),
}
# A published rank is another thing where layers have 16 to 96 channels: each of the two also with what the other has.
SAME_BUDGET, SAME_RANK = "svdquant-same-budget", "qartsr-same-rank"
# A published grid has one code less than it could, which are three of four at 2 bits: also with all codes and clipped bounds.
AFFINE, AFFINE_SAME_BUDGET = "svdquant-affine", "svdquant-affine-same-budget"
# QArtSR's budget lets some layers run at more bits: without these, and the others with them.
SAME_BITS, WIDER = "qartsr-same-bits", {"lsq-same-budget": "lsq", "efficientdm-same-budget": "efficientdm"}
EQUAL = (SAME_BUDGET, SAME_RANK, AFFINE, AFFINE_SAME_BUDGET, SAME_BITS, *WIDER)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: on the command line and in file names.
        label: in tables.
        kind: "method" or "ablation".
    """

    name: str
    label: str
    kind: str
    recipe: Recipe = field(compare=False)  # told by the name; holds dictionaries, which have no hash


def method_names() -> tuple[str, ...]:
    """Everything that --methods takes."""
    return (*METHODS, *EQUAL, *ABLATIONS)


def _made_equal(name: str) -> tuple[str, Recipe]:
    """Label and recipe of one of EQUAL: a method with what another one has, in multiplications, bytes or codes."""
    svdquant, main = load_recipe("svdquant"), load_recipe(MAIN)
    if name == SAME_RANK:
        ranked = _with_layer(main, branch_rank=svdquant.layer.branch_rank)
        return f"{main.method}, ranks of {svdquant.method}", replace(ranked, budget=Budget())
    if name == SAME_BITS:
        return f"{main.method}, all layers at the stated bits", replace(main, budget=replace(main.budget, wider=0.0))
    if name in WIDER:
        other = load_recipe(WIDER[name])
        return f"{other.method}, bits of {main.method}", replace(other, budget=replace(main.budget, branch=None))
    label = svdquant.method
    if name in (AFFINE, AFFINE_SAME_BUDGET):
        label, svdquant = f"{label}, affine grid", _with_layer(svdquant, group_grid="affine")
    if name in (SAME_BUDGET, AFFINE_SAME_BUDGET):
        label = f"{label}, equal cost"
        svdquant = _with_layer(svdquant, branch_rank=main.layer.branch_rank, branch_budget=main.budget.branch or 0.0)
    return label, svdquant


def make_method(name: str, steps: int) -> Method:
    """One of `method_names`, with so many steps if it trains."""
    if name in ABLATIONS:
        label, change = ABLATIONS[name]
        kind, recipe = "ablation", change(load_recipe(MAIN))
    elif name in EQUAL:
        kind, (label, recipe) = "method", _made_equal(name)
    else:
        kind, recipe = "method", load_recipe(name)
        label = recipe.method
    trains = recipe.stages and not (name in ABLATIONS and not recipe.steps)
    return Method(name, label, kind, replace(recipe, steps=steps if trains else 0))


@dataclass(frozen=True)
class Cell:
    """What is made and measured once.

    Attributes:
        model: "" for the model itself, "t999" for the one before TRQ.
    """

    method: Method
    bits: str
    seed: int = 0
    model: str = ""

    @property
    def group(self) -> str:
        """Name without the seed: cells of a group share a learning rate."""
        return "-".join(filter(None, (self.method.name, self.bits, self.model)))

    @property
    def key(self) -> str:
        return f"{self.group}-seed{self.seed}"
