"""What a quantization method is, as data: which parameters exist, how they start, and in which stages they are trained.

A recipe is a YAML file, `recipes/NAME.yaml`, one a method; bits are an argument. Its keys are the attributes of `Recipe`,
`Layer` and `Stage`, which document them. The engine knows no method by name.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qartsr_pipeline.quantization.scheme import LayerScheme

VERSION = 1

BOUNDS = ("minmax", "percentile", "mse")
SMOOTHING = ("none", "ones", "search")
OFFSETS = ("none", "zero", "mean", "centre")
ROTATIONS = ("none", "hadamard")
ACTIVATIONS = ("static", "dynamic")
CLIP = ("after_rounding", "before_rounding")
MODULES = ("blocks", "parts", "all")
ORDERS = ("reversed", "forward", "distributed")
OTHERS = ("quantized_so_far", "full_precision")
TRAINED = ("smoothing", "offset", "branch", "adapter", "bounds", "step")
LOSSES = ("module_l2", "noise_l2", "image_l2", "image_l1", "perceptual", "lpips")
DEFAULT_KEEP = dict.fromkeys(("unet.conv_in", "unet.conv_out", "vae.encoder.conv_in", "vae.decoder.conv_out"), "w8a8")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the file, the key and what is expected."""


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def _number(name: str, value: object, least: float, most: float = math.inf, whole: bool = False) -> None:
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
        adapter_rank: rank of the adapter F1 F2 that is merged into the weight before quantization, started at 0, or at what keeps
            the residual weight as it is, as far as this rank goes, when a branch is fitted; 0 for none.
        bounds: "minmax", "percentile" (of inputs) or "mse" (least squared error).
        percentile: share of input values inside the bounds, for "percentile".
        rotation: "none", or "hadamard": inputs and weights are rotated by a block-diagonal Hadamard matrix.
        activations: "static" bounds of the whole tensor, or "dynamic": symmetric, from the extremes of every pixel's or token's
            group of channels at run time.
        group_size: input channels that share a weight scale (and a dynamic activation scale); 0 for one scale a row.
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
    adapter_rank: int = 0
    bounds: str = "minmax"
    percentile: float = 99.9
    rotation: str = "none"
    activations: str = "static"
    group_size: int = 0
    clip: str = "after_rounding"

    def __post_init__(self) -> None:
        _one_of("layer.smoothing", self.smoothing, SMOOTHING)
        _one_of("layer.offset", self.offset, OFFSETS)
        _one_of("layer.bounds", self.bounds, BOUNDS)
        _one_of("layer.rotation", self.rotation, ROTATIONS)
        _one_of("layer.activations", self.activations, ACTIVATIONS)
        _one_of("layer.clip", self.clip, CLIP)
        _number("layer.branch_rank", self.branch_rank, 0, whole=True)
        _number("layer.branch_budget", self.branch_budget, 0)
        if not isinstance(self.branch_ranks, dict):
            raise RecipeError(f"layer.branch_ranks is {self.branch_ranks!r}, expected layer patterns with ranks: unet.*: 4")
        for pattern, rank in self.branch_ranks.items():
            _number(f"layer.branch_ranks.{pattern}", rank, 0, whole=True)
        _number("layer.branch_rounds", self.branch_rounds, 0, whole=True)
        _number("layer.adapter_rank", self.adapter_rank, 0, whole=True)
        _number("layer.percentile", self.percentile, 50, 100)
        _number("layer.group_size", self.group_size, 0, whole=True)
        if self.activations == "dynamic" and self.offset != "none":
            raise RecipeError("layer.offset needs static activations: dynamic ones are symmetric around 0")
        if self.branch_budget and not self.branch_rank:
            raise RecipeError("layer.branch_budget needs a branch_rank, the highest that a layer may get")
        if not isinstance(self.branch_fit, bool):
            raise RecipeError(f"layer.branch_fit is {self.branch_fit!r}, expected true or false")
        for name in ("branch_rounds", "branch_fit"):
            if getattr(self, name) and (not self.has_branches or self.rotation != "none"):
                raise RecipeError(f"layer.{name} needs a branch, and no rotation: give it with those or not at all")
        if self.branch_rounds and self.branch_fit:
            raise RecipeError("layer.branch_rounds and layer.branch_fit are two ways to improve the branch: give one of them")

    @property
    def has_branches(self) -> bool:
        """Whether any layer can have a low-rank branch."""
        return self.branch_rank > 0 or any(self.branch_ranks.values())

    @property
    def deployable(self) -> bool:
        """Whether a deployed form exists: other grids than the package's own exist in simulation, for comparison."""
        return self.offset == "none" and self.rotation == "none" and self.activations == "static" and self.group_size == 0


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: for bars, plots and reports.
        modules: what is quantized and trained at a time: "blocks" (each ResNet block, transformer block, sampler, first and last
            layer), "parts" (encoder, UNet, decoder) or "all" (everything at once).
        order: of the modules: "reversed" from the output to the input, "forward", or "distributed": the middle of the largest gap
            next, so that the modules done so far are always spread over the network.
        others: what the rest of the network is meanwhile: "quantized_so_far": modules that had their turn are quantized, and go
            on being trained, the others are full precision; "full_precision": all but the module itself.
        train: which parameters, of smoothing, offset, branch, adapter, bounds, step. "step" trains one factor for both bounds
            (the step size, with the zero point kept), "bounds" each for itself.
        loss: weight of each term, by name: module_l2 (norm of the error of the module's own output, relative to that of the
            output), noise_l2 (the same of the UNet's output), image_l2 (root mean square of the picture's error, values in
            [-1, 1]), image_l1 (its mean), perceptual, and lpips: the weight that LPIPS gets in the place of perceptual where that
            is the run's perceptual loss, because its values are others; see `with_perceptual`.
        share: of the run's steps, relative to the shares of the other stages; divided evenly between the modules.
        lr: step size relative to the size of what is trained. It ends at 0 along a cosine, of every turn; but it is constant
            while modules have their turns in a network that is quantized so far.
        layers: pattern of "component.layer" names; only those that match are trained.
        patch: side of the high-resolution patches in pixels, a multiple of 16.
        batch: patches a step.
    """

    name: str
    modules: str = "all"
    order: str = "reversed"
    others: str = "quantized_so_far"
    train: tuple[str, ...] = ("bounds",)
    loss: dict[str, float] = field(default_factory=lambda: {"image_l2": 1.0})
    share: float = 1.0
    lr: float = 3e-3
    layers: str = "*"
    patch: int = 96
    batch: int = 4

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}: "
        _one_of(where + "modules", self.modules, MODULES)
        _one_of(where + "order", self.order, ORDERS)
        _one_of(where + "others", self.others, OTHERS)
        if not isinstance(self.train, (list, tuple)) or not self.train:
            raise RecipeError(f"{where}train is {self.train!r}, expected a list of {', '.join(TRAINED)}")
        object.__setattr__(self, "train", tuple(self.train))
        for part in self.train:
            _one_of(where + "train", part, TRAINED)
        if {"bounds", "step"} <= set(self.train):
            raise RecipeError(f"{where}train has both bounds and step: the step is a factor of both bounds, train one of them")
        if not isinstance(self.loss, dict) or not self.loss:
            raise RecipeError(f"{where}loss is {self.loss!r}, expected weights of {', '.join(LOSSES)}")
        for term, weight in self.loss.items():
            _one_of(where + "loss", term, LOSSES)
            _number(f"{where}loss.{term}", weight, 0)
        if not any(self.loss.values()):
            raise RecipeError(f"{where}loss has only weights of 0, which trains nothing: give one of them a weight")
        if self.modules == "all" and "module_l2" in self.loss:
            raise RecipeError(f"{where}loss.module_l2 needs modules: blocks or parts; with all at once no module has a turn")
        if not isinstance(self.layers, str):
            raise RecipeError(f"{where}layers is {self.layers!r}, expected a pattern of layer names such as vae.*")
        _number(where + "share", self.share, 0)
        _number(where + "lr", self.lr, 1e-12)
        _number(where + "patch", self.patch, 16, whole=True)
        _number(where + "batch", self.batch, 1, whole=True)
        if self.patch % 16:
            raise RecipeError(f"{where}patch is {self.patch}, expected a multiple of 16")


@dataclass(frozen=True)
class Recipe:
    """A quantization method.

    Attributes:
        method: its name in tables.
        source: the publication.
        reading: what of this recipe is our reading, where the publication is silent.
        layer: the parameters of every layer.
        stages: their training, in order; none for a method that does not train.
        keep: pattern of "component.layer" names -> bits such as w8a8, or w16a16 to leave layers as they are. The first match
            wins. These layers have no branch, and never fewer bits than the others.
        steps: optimizer steps of the whole run.
        images: calibration pictures that observers see.
        image_size: their side in pixels, high resolution.
        cached_batches: batches of patches whose module inputs are kept while a module has its turn.
    """

    method: str
    source: str
    reading: str = ""
    layer: Layer = field(default_factory=Layer)
    stages: tuple[Stage, ...] = ()
    keep: dict[str, str] = field(default_factory=DEFAULT_KEEP.copy)
    steps: int = 0
    images: int = 16
    image_size: int = 256
    cached_batches: int = 8

    def __post_init__(self) -> None:
        for name in ("method", "source", "reading"):
            if not isinstance(getattr(self, name), str):
                raise RecipeError(f"{name} is {getattr(self, name)!r}, expected text")
        if not isinstance(self.keep, dict):
            raise RecipeError(f"keep is {self.keep!r}, expected layer patterns with bits, such as unet.conv_in: w8a8")
        for pattern, bits in self.keep.items():
            try:
                LayerScheme(*parse_bits(bits))
            except ValueError as error:
                raise RecipeError(f"keep.{pattern}: {error}") from None
        _number("steps", self.steps, 0, whole=True)
        for name in ("images", "cached_batches"):
            _number(name, getattr(self, name), 1, whole=True)
        _number("image_size", self.image_size, 32, whole=True)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise RecipeError(f"two stages have the same name: {', '.join(names)}")
        if self.steps and not any(stage.share for stage in self.stages):
            lacking = "all stages have a share of 0" if self.stages else "the recipe has no stages to spend them on"
            raise RecipeError(f"steps is {self.steps}, but {lacking}")
        self._check_trained_exists()

    def _check_trained_exists(self) -> None:
        exists = {
            "smoothing": self.layer.smoothing != "none",
            "offset": self.layer.offset != "none",
            "branch": self.layer.has_branches,
            "adapter": self.layer.adapter_rank > 0,
        }
        for stage in self.stages:
            for part in stage.train:
                if not exists.get(part, True):
                    raise RecipeError(f"stage {stage.name!r} trains {part}, which layer does not have: give it there or not here")

    @property
    def is_perceptual(self) -> bool:
        """Whether a stage has a perceptual loss."""
        return any(stage.loss.get("perceptual") or stage.loss.get("lpips") for stage in self.stages)

    def steps_of(self, stage: Stage, modules: int) -> list[int]:
        """Steps for each of the stage's modules, as even as whole numbers allow; they add up to the stage's share."""
        shares = [each.share for each in self.stages]
        before = sum(shares[: self.stages.index(stage)])
        start, end = (round(self.steps * part / (sum(shares) or 1)) for part in (before, before + stage.share))
        total = end - start
        return [total * (i + 1) // modules - total * i // modules for i in range(modules)]

    def to_dict(self) -> dict[str, Any]:
        """JSON types, readable by `from_dict`."""
        return {"version": VERSION, **asdict(self), "stages": [asdict(s) | {"train": list(s.train)} for s in self.stages]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """From parsed YAML or JSON.

        Raises:
            RecipeError: unknown or missing keys, values out of range.
        """
        if not isinstance(data, dict):
            raise RecipeError("expected keys and values, such as `version: 1`")
        data = dict(data)
        if data.pop("version", None) != VERSION:
            raise RecipeError(f"version is missing or another one; this program reads `version: {VERSION}`")
        layer = _build(Layer, data.pop("layer", None) or {}, "layer.")
        stages = data.pop("stages", None) or []
        if not isinstance(stages, list):
            raise RecipeError(f"stages is {stages!r}, expected a list")
        stages = tuple(_build(Stage, stage, f"stages[{index}].") for index, stage in enumerate(stages))
        return _build(cls, data | {"layer": layer, "stages": stages}, "")


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"{where[:-1]} is {data!r}, expected keys and values")
    known = {part.name: part for part in fields(kind)}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            raise RecipeError(
                f"unknown key {where}{key}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
            )
    try:
        return kind(**data)
    except TypeError as error:
        raise RecipeError(f"{where[:-1] or 'recipe'}: {str(error).partition('() ')[2] or error}") from None


def parse_bits(text: str) -> tuple[int, int]:
    """ "w4a4" -> (4, 4).

    Raises:
        ValueError: if it is not of that form.
    """
    match = re.fullmatch(r"w(\d+)a(\d+)", str(text).lower())
    if not match:
        raise ValueError(f"bits are {text!r}, expected a form such as w4a4 or w8a8")
    return int(match[1]), int(match[2])


def check_quantizes(bits: tuple[int, int]) -> None:
    """Raises ValueError where there is no such quantizer for weights and activations, or nothing to quantize."""
    LayerScheme(*bits)
    if min(bits) == 16:
        raise ValueError("bits are w16a16, which quantizes nothing: give weights or activations fewer, such as w4a16 or w8a8")
