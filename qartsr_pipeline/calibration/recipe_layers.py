"""The parts of a recipe that say what layers are: their parameters, and the budget that gives each its bits and rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

ROUNDING = ("nearest", "patches")
ROUNDING_INPUTS = ("full_precision", "quantized")
BOUNDS = ("minmax", "percentile", "mse")
SMOOTHING = ("none", "ones", "search")
OFFSETS = ("none", "zero", "mean", "centre")
ROTATIONS = ("none", "hadamard", "online")
ACTIVATIONS = ("static", "dynamic", "token")
READINGS = ("channels", "scalar")
RULES = ("percentile", "absolute")
GROUP_GRIDS = ("symmetric", "affine")
CLIP = ("after_rounding", "before_rounding")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is expected."""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def number(name: str, value: object, least: float, most: float = math.inf, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        limit = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
        raise RecipeError(f"{name} is {value!r}, expected a {'whole ' if whole else ''}number {limit}")


@dataclass(frozen=True)
class Layer:
    """The quantization parameters that every layer has, and how they start.

    Attributes:
        smoothing: phi per input channel. "none", "ones" (to be trained) or "search" (SmoothQuant's formula, the exponent of least
            output error among a few).
        offset: per input channel, subtracted before quantization. "none", "zero" (to be trained), "mean" or "centre" (of the
            extremes) of the calibration inputs.
        branch_rank: rank of the 16-bit low-rank branch L1 L2, started from the SVD of the smoothed weight; 0 for none.
        branch_ranks: pattern of "component.layer" names -> rank, for layers that need another one. The first match wins.
        branch_budget: share of the layers' own multiplications that all branches may cost. Every layer then has its own rank, up
            to branch_rank, where that removes most of the picture's error; 0 gives all layers branch_rank.
        branch_rounds: of refinement of that start at most: the branch from what quantization leaves of the weight, and again.
        branch_fit: whether that start is then fitted to what quantization leaves of the layer's outputs, on a sample of inputs.
        residual: with "token": the weight that is quantized has a change of its own, zero until a branch is fitted, weights are
            rounded on patches, or a stage trains it. Nothing that is stored is larger for it.
        adapter_rank: rank of the adapter F1 F2 that is merged into the weight before quantization, started at 0, or at what keeps
            the residual weight as it is, as far as this rank goes, when a branch is fitted; 0 for none.
        rounding: of weights, when parameters are set: "nearest", or "patches": errors of taps and channels make up for each other
            on patches of the layer's input; the adapter holds the difference.
        rounding_inputs: of these patches: "full_precision", or "quantized": in runs whose activations have 2 or 3 bits,
            weights are rounded once more, in running order, on what comes out of the quantized layers before.
        bounds: "minmax", "percentile" (of inputs) or "mse" (least squared error).
        percentile: share of input values inside the bounds, for "percentile".
        rotation: "none", or "hadamard": inputs and weights are rotated by a block-diagonal Hadamard matrix. With "token" it goes
            into the weights before anything else, where that is possible; "online", for "token" alone: every layer rotates its
            smoothed input at run time.
        activations: "static" bounds of the whole tensor; "token": of linear layers symmetric, from each token's largest magnitude
            at run time; or "dynamic": from the extremes of every pixel's or token's group of channels, in simulation only.
        exponents: with "token": static scales of input channels as well, powers of two.
        group_size: input channels that share a weight scale (and a dynamic activation scale); 0 for one scale a row.
        group_grid: of weights in groups and of dynamic activations. "symmetric", from the largest magnitude: one code less, so
            three at 2 bits; or "affine": all codes and a zero point, between extremes that are shrunken to the least squared
            error, of each group of a weight, and by one factor for all groups of a layer's input.
        clip: a value within half a step beyond the extreme codes is clipped, for gradients, "before_rounding" (as in LSQ), or
            counts as inside "after_rounding". The quantized values are the same.
    """

    smoothing: str = "none"
    offset: str = "none"
    branch_rank: int = 0
    branch_ranks: dict[str, int] = field(default_factory=dict)
    branch_budget: float = 0.0
    branch_rounds: int = 0
    branch_fit: bool = False
    residual: bool = False
    adapter_rank: int = 0
    rounding: str = "nearest"
    rounding_inputs: str = "full_precision"
    bounds: str = "minmax"
    percentile: float = 99.9
    rotation: str = "none"
    activations: str = "static"
    exponents: bool = False
    group_size: int = 0
    group_grid: str = "symmetric"
    clip: str = "after_rounding"

    def __post_init__(self) -> None:
        one_of("layer.smoothing", self.smoothing, SMOOTHING)
        one_of("layer.offset", self.offset, OFFSETS)
        one_of("layer.rounding", self.rounding, ROUNDING)
        one_of("layer.rounding_inputs", self.rounding_inputs, ROUNDING_INPUTS)
        one_of("layer.bounds", self.bounds, BOUNDS)
        one_of("layer.rotation", self.rotation, ROTATIONS)
        if self.rotation == "online" and self.activations != "token":
            raise RecipeError("layer.rotation: online needs activations: token; hadamard is for all")
        one_of("layer.activations", self.activations, ACTIVATIONS)
        one_of("layer.group_grid", self.group_grid, GROUP_GRIDS)
        one_of("layer.clip", self.clip, CLIP)
        number("layer.branch_rank", self.branch_rank, 0, whole=True)
        number("layer.branch_budget", self.branch_budget, 0)
        if not isinstance(self.branch_ranks, dict):
            raise RecipeError(f"layer.branch_ranks is {self.branch_ranks!r}, expected layer patterns with ranks: unet.*: 4")
        for pattern, rank in self.branch_ranks.items():
            number(f"layer.branch_ranks.{pattern}", rank, 0, whole=True)
        number("layer.branch_rounds", self.branch_rounds, 0, whole=True)
        number("layer.adapter_rank", self.adapter_rank, 0, whole=True)
        number("layer.percentile", self.percentile, 50, 100)
        number("layer.group_size", self.group_size, 0, whole=True)
        if self.activations != "static" and self.offset != "none":
            raise RecipeError("layer.offset needs static activations: others are symmetric around 0")
        if not isinstance(self.exponents, bool) or self.exponents and self.activations != "token":
            raise RecipeError(
                f"layer.exponents is {self.exponents!r}, expected true or false, and true with activations: token only"
            )
        if not isinstance(self.residual, bool) or self.residual and (self.activations != "token" or self.adapter_rank):
            raise RecipeError(
                f"layer.residual is {self.residual!r}, expected true or false, true with activations: token and no adapter_rank"
            )
        if self.group_grid == "affine" and not (self.group_size or self.activations == "dynamic"):
            raise RecipeError("layer.group_grid: affine needs a group_size or dynamic activations: other grids are affine anyway")
        if self.branch_budget and not self.branch_rank:
            raise RecipeError("layer.branch_budget needs a branch_rank, the highest that a layer may get")
        if not isinstance(self.branch_fit, bool):
            raise RecipeError(f"layer.branch_fit is {self.branch_fit!r}, expected true or false")
        for name in ("branch_rounds", "branch_fit"):
            if getattr(self, name) and (not self.has_branches or self.rotation != "none" and self.activations != "token"):
                raise RecipeError(f"layer.{name} needs a branch, and no rotation but with activations: token")
        if self.rounding == "patches" and not ((self.adapter_rank or self.residual) and self.deployable):
            raise RecipeError("layer.rounding: patches needs an adapter_rank or residual, and a grid of the package: give those")
        if self.branch_rounds and self.branch_fit:
            raise RecipeError("layer.branch_rounds and layer.branch_fit are two ways to improve the branch: give one of them")

    @property
    def has_branches(self) -> bool:
        """Whether any layer can have a low-rank branch."""
        return self.branch_rank > 0 or any(self.branch_ranks.values())

    @property
    def deployable(self) -> bool:
        """Whether a deployed form exists: other grids than the package's own exist in simulation, for comparison."""
        if self.offset != "none" or self.group_size:
            return False
        return self.activations == "token" or self.activations == "static" and self.rotation == "none"


@dataclass(frozen=True)
class Volts:
    """How stages with ``modules: layers`` divide their steps, by the sensitivity of layers (VOLTS of LSGQuant, arXiv 2602.03182):
    the variance over clips, or images, of a layer's mean input.

    Attributes:
        reading: "channels": of each channel's mean, averaged over channels; "scalar": of the mean of all values.
        rule: what ``low`` and ``high`` are: "percentile" of the layers, or "absolute" sensitivities, which fit one model only.
        low, high: layers up to ``low`` are trained for ``low_steps``, those up to ``high`` for ``medium_steps``, the others in
            rounds of ``medium_steps`` until they converge, or what is left of the stage's steps is spent.
        low_steps, medium_steps: steps of a layer.
        converged: a layer has converged once a round lowers its error by less than this share.
    """

    reading: str = "channels"
    rule: str = "percentile"
    low: float = 33.0
    high: float = 67.0
    low_steps: int = 1
    medium_steps: int = 30
    converged: float = 0.01

    def __post_init__(self) -> None:
        one_of("volts.reading", self.reading, READINGS)
        one_of("volts.rule", self.rule, RULES)
        number("volts.low", self.low, 0, 100 if self.rule == "percentile" else math.inf)
        number("volts.high", self.high, self.low, 100 if self.rule == "percentile" else math.inf)
        number("volts.low_steps", self.low_steps, 0, whole=True)
        number("volts.medium_steps", self.medium_steps, 1, whole=True)
        number("volts.converged", self.converged, 0, 1)


@dataclass(frozen=True)
class Budget:
    """What a model may cost, in the terms of `quantization.accounting`. Layers then get the bits and ranks that leave the least
    error of the image within it: the stated bits at least, 8 at most, and ranks up to layer.branch_rank. None is no limit; a
    budget without any limit leaves all layers at the stated bits.

    Attributes:
        bits: bits a weight of the UNet's and the VAE's files.
        extra_bits: the same, beyond what the model has with all layers at the stated bits and no branches; for recipes that serve
            all bits and models.
        branch: multiplications of all branches, as a share of those of the quantized layers.
        wider: share of the quantized layers' multiplications that may run at other bits than the stated ones, beside the layers
            that `keep` names.
    """

    bits: float | None = None
    extra_bits: float | None = None
    branch: float | None = None
    wider: float | None = None

    def __post_init__(self) -> None:
        for name in ("bits", "extra_bits", "branch", "wider"):
            value = getattr(self, name)
            if value is not None:
                number(f"budget.{name}", value, 0, 1 if name == "wider" else math.inf)
        if self.bits is not None and self.extra_bits is not None:
            raise RecipeError("budget has both bits and extra_bits: give the limit once, as it is or beyond the least")

    @property
    def is_set(self) -> bool:
        return any(value is not None for value in (self.bits, self.extra_bits, self.branch, self.wider))
