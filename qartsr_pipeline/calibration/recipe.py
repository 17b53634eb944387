"""What a quantization method is, as data: which parameters exist, how they start, and in which stages they are trained.

A recipe is a YAML file, `recipes/NAME.yaml`, one a method; bits are an argument. Its keys are the attributes of `Recipe`,
`Layer`, `Budget`, `Volts` and `Stage`, which document them. The engine knows no method by name.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qartsr_pipeline.calibration.recipe_layers import Budget, Layer, RecipeError, Volts, number, one_of
from qartsr_pipeline.quantization.scheme import LayerScheme

VERSION = 1

MODULES = ("blocks", "parts", "all", "layers")
ORDERS = ("reversed", "forward", "distributed", "sensitive")
OTHERS = ("quantized_so_far", "full_precision")
TRAINED = ("smoothing", "offset", "branch", "adapter", "bias", "residual", "bounds", "step")
LOSSES = ("module_l2", "noise_l2", "image_l2", "image_l1", "perceptual", "lpips")
DEFAULT_KEEP = dict.fromkeys(("unet.conv_in", "unet.conv_out", "vae.encoder.conv_in", "vae.decoder.conv_out"), "w8a8")


@dataclass(frozen=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: for bars, plots and reports.
        modules: what is quantized and trained at a time: "blocks" (each ResNet block, transformer block, sampler, first and last
            layer), "parts" (encoder, UNet, decoder), "all" (everything at once), or "layers", each on recordings of its own
            full-precision input, with the steps that `Recipe.volts` gives it.
        order: of the modules: "reversed" from the output to the input, "forward", or "distributed": the middle of the largest gap
            next, so that the modules done so far are always spread over the network. Of layers: "sensitive", the most sensitive
            first.
        others: what the rest of the network is meanwhile: "quantized_so_far": modules that had their turn are quantized, and go
            on being trained, the others are full precision; "full_precision": all but the module itself.
        train: which parameters, of smoothing, offset, branch, adapter, bias, residual, bounds, step. "step" trains one factor
            for both bounds (the step size, with the zero point kept), "bounds" each for itself.
        loss: weight of each term, by name: module_l2 (norm of the error of the module's own output, relative to that of the
            output), noise_l2 (the same of the UNet's output), image_l2 (root mean square of the picture's error, values in
            [-1, 1]), image_l1 (its mean), perceptual, and lpips: the weight that LPIPS gets in the place of perceptual where that
            is the run's perceptual loss, because its values are others; see `with_perceptual`.
        share: of the run's steps, relative to the shares of the other stages; divided evenly between the modules.
        lr: step size relative to the size of what is trained. It ends at 0 along a cosine, of every turn; but it is constant
            while modules have their turns in a network that is quantized so far.
        rates: kind of parameter, as in ``train`` -> factor of ``lr`` for it; 1 for the others.
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
    rates: dict[str, float] = field(default_factory=dict)
    layers: str = "*"
    patch: int = 96
    batch: int = 4

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}: "
        one_of(where + "modules", self.modules, MODULES)
        one_of(where + "order", self.order, ORDERS)
        one_of(where + "others", self.others, OTHERS)
        if not isinstance(self.train, (list, tuple)) or not self.train:
            raise RecipeError(f"{where}train is {self.train!r}, expected a list of {', '.join(TRAINED)}")
        object.__setattr__(self, "train", tuple(self.train))
        for part in self.train:
            one_of(where + "train", part, TRAINED)
        if {"bounds", "step"} <= set(self.train):
            raise RecipeError(f"{where}train has both bounds and step: the step is a factor of both bounds, train one of them")
        if not isinstance(self.rates, dict):
            raise RecipeError(f"{where}rates is {self.rates!r}, expected factors of {', '.join(self.train)}")
        for part, rate in self.rates.items():
            one_of(where + "rates", part, self.train)
            number(f"{where}rates.{part}", rate, 0)
        if not isinstance(self.loss, dict) or not self.loss:
            raise RecipeError(f"{where}loss is {self.loss!r}, expected weights of {', '.join(LOSSES)}")
        for term, weight in self.loss.items():
            one_of(where + "loss", term, LOSSES)
            number(f"{where}loss.{term}", weight, 0)
        if not any(self.loss.values()):
            raise RecipeError(f"{where}loss has only weights of 0, which trains nothing: give one of them a weight")
        if self.modules == "all" and "module_l2" in self.loss:
            raise RecipeError(f"{where}loss.module_l2 needs modules: blocks or parts; with all at once no module has a turn")
        of_layers = self.modules == "layers"
        if of_layers and (self.others != "full_precision" or set(self.loss) != {"module_l2"}):
            raise RecipeError(f"{where}modules: layers needs others: full_precision and the loss module_l2 alone, of each layer")
        if of_layers != (self.order == "sensitive"):
            raise RecipeError(f"{where}order: sensitive is that of modules: layers, and the only one they have: give both")
        if not isinstance(self.layers, str):
            raise RecipeError(f"{where}layers is {self.layers!r}, expected a pattern of layer names such as vae.*")
        number(where + "share", self.share, 0)
        number(where + "lr", self.lr, 1e-12)
        number(where + "patch", self.patch, 16, whole=True)
        number(where + "batch", self.batch, 1, whole=True)
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
        volts: how stages that train layer by layer divide their steps.
        budget: what layers that nothing is said of may cost together, if they are to have bits and ranks of their own.
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
    budget: Budget = field(default_factory=Budget)
    volts: Volts = field(default_factory=Volts)
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
        number("steps", self.steps, 0, whole=True)
        for name in ("images", "cached_batches"):
            number(name, getattr(self, name), 1, whole=True)
        number("image_size", self.image_size, 32, whole=True)
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise RecipeError(f"two stages have the same name: {', '.join(names)}")
        if self.steps and not any(stage.share for stage in self.stages):
            lacking = "all stages have a share of 0" if self.stages else "the recipe has no stages to spend them on"
            raise RecipeError(f"steps is {self.steps}, but {lacking}")
        if self.budget.is_set and self.layer.branch_budget:
            raise RecipeError("budget and layer.branch_budget both decide on ranks: give one of them")
        if self.budget.is_set and not self.layer.deployable:
            raise RecipeError("budget counts what is stored and run, and this layer has no such form: leave it out")
        self._check_trained_exists()

    def _check_trained_exists(self) -> None:
        exists = {
            "smoothing": self.layer.smoothing != "none",
            "offset": self.layer.offset != "none",
            "branch": self.layer.has_branches,
            "adapter": self.layer.adapter_rank > 0,
            "residual": self.layer.residual,
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
        budget = _build(Budget, data.pop("budget", None) or {}, "budget.")
        volts = _build(Volts, data.pop("volts", None) or {}, "volts.")
        return _build(cls, data | {"layer": layer, "stages": stages, "budget": budget, "volts": volts}, "")


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
