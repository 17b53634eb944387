"""What a recipe asks of every layer of a full-precision pipeline: bits and ranks, from what the layers see."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.recipe import Budget, Recipe, RecipeError, parse_bits
from qartsr_pipeline.calibration.start.budget import (
    Assignment,
    Choice,
    LayerErrors,
    Limits,
    assign,
    choices_of,
    corrected,
    errors_of_ways,
)
from qartsr_pipeline.calibration.start.observers import InputSample, observe
from qartsr_pipeline.calibration.start.ranks import RankBudget, RankedLayer, Sensitivity, ranks_within_budget, sensitivities
from qartsr_pipeline.calibration.training.blocks import LARGE, Block, outermost
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.progress import follow
from qartsr_pipeline.calibration.training.stages import MEMORY_FOR_ACTIVATIONS, Recording, TensorStore
from qartsr_pipeline.quantization.accounting import Work, stored_bytes
from qartsr_pipeline.quantization.calibrating import Kinds
from qartsr_pipeline.quantization.deployed import deployed_like
from qartsr_pipeline.quantization.scheme import (
    LARGEST_ROTATION,
    LayerScheme,
    QuantizationScheme,
    quantizable_layers,
    replace_module,
)

Schemes = dict[str, QuantizationScheme]  # by component
Samples = dict[str, InputSample]  # by "component.layer"
SENSITIVITY_BATCHES, SENSITIVITY_COUNT, SENSITIVITY_SIDE = 4, 2, 128  # batches, images of each, and their side at most


def given_rank(recipe: Recipe, name: str) -> int | None:
    """The rank that the recipe itself gives to "component.layer", None where it leaves it to the rule for all."""
    return next((rank for pattern, rank in recipe.layer.branch_ranks.items() if fnmatchcase(name, pattern)), None)


def fold_and_make_schemes(pipeline: DiffusionPipeline, recipe: Recipe, bits: tuple[int, int]) -> Schemes:
    """Folds the model's constants in place, and gives the scheme of every component.

    Layers that the recipe keeps at more bits have no low-rank branch. Where ranks are under a budget, `give_ranks` gives them.

    Raises:
        RecipeError: a pattern of `keep` contradicts those before it.
        ValueError: the pipeline is quantized already, or there is no quantizer of so many bits.
    """
    family = family_of(pipeline)
    models = family.models(pipeline)
    if any(getattr(model, "is_quantized", False) for model in models.values()):  # set by diffusers when it loads such a model
        raise ValueError("the model is quantized already; quantize the full-precision model that it was made from")
    chosen = recipe.layer.branch_budget or recipe.budget.is_set
    folding = family.fold(pipeline)
    rotation = recipe.layer.rotation if recipe.layer.activations == "token" else "none"
    online = None if rotation == "online" else family.rotate(pipeline) if rotation == "hadamard" else ()
    grid = replace(_grid(recipe), rotation=LARGEST_ROTATION if online is None else 0)
    default = _with_bits(grid, *bits, rank=0 if chosen else recipe.layer.branch_rank)
    _check_keep(family.kept(recipe), models)
    schemes = {}
    for component, model in models.items():
        kept: dict[str, LayerScheme | None] = {}
        for pattern, text in family.kept(recipe).items():
            if pattern.startswith(f"{component}."):
                weights, activations = parse_bits(text)
                own = _with_bits(grid, max(weights, bits[0]), max(activations, bits[1]))
                kept[pattern.removeprefix(f"{component}.")] = own
        plain = QuantizationScheme(default, kept)
        rotated: dict[str, LayerScheme | None] = {}
        for name, (_, scheme) in quantizable_layers(model, plain).items():
            rank = given_rank(recipe, f"{component}.{name}")
            if rank is not None and scheme == default:
                scheme = kept[name] = replace(default, rank=rank)
            if any(fnmatchcase(f"{component}.{name}", pattern) for pattern in online or ()):
                rotated[name] = replace(scheme, rotation=LARGEST_ROTATION)
        schemes[component] = QuantizationScheme(default, {**rotated, **kept, **rotated}, folding.get(component))
    return schemes


def _grid(recipe: Recipe) -> LayerScheme:
    """The recipe's grid; bits and rank of what this gives mean nothing."""
    layer = recipe.layer
    return LayerScheme(grid="token", exponents=layer.exponents) if layer.activations == "token" else LayerScheme()


def _with_bits(grid: LayerScheme, weight_bits: int, activation_bits: int, rank: int = 0) -> LayerScheme:
    exponents = grid.exponents and activation_bits < 16
    return replace(grid, weight_bits=weight_bits, activation_bits=activation_bits, rank=rank, exponents=exponents)


def _check_keep(kept: Mapping[str, str], models: dict[str, nn.Module]) -> None:
    """Raises RecipeError where a pattern asks for bits that none of its layers gets: patterns before it ask for others."""
    every = QuantizationScheme(LayerScheme())
    names = [f"{component}.{name}" for component, model in models.items() for name in quantizable_layers(model, every)]
    for pattern, bits in kept.items():
        firsts = {next(p for p in kept if fnmatchcase(n, p)) for n in names if fnmatchcase(n, pattern)}
        others = [first for first in firsts if kept[first] != bits]
        if others and pattern not in firsts:
            raise RecipeError(
                f"keep.{pattern} is {bits}, but the patterns before it decide on all its layers, such as keep.{others[0]}:"
                f" {kept[others[0]]}. The first match wins: put it first, or leave one of them out"
            )


def observe_full_precision(context: CalibrationContext, schemes: Schemes) -> Samples:
    """A sample of every layer's input over the recipe's calibration images; the pipeline is still full precision."""
    family, pipeline = context.family, context.pipeline
    layers = {
        f"{component}.{name}": layer
        for component, model in family.models(pipeline).items()
        for name, (layer, _) in quantizable_layers(model, schemes[component]).items()
    }
    batches = family.observed_batches(context.patches, context.recipe, context.degradation, context.seed)
    followed = follow(context.progress, batches, "observe")
    return observe(
        layers, lambda batch: family.observe(pipeline, batch), followed, windows=context.recipe.layer.rounding == "patches"
    )


def give_ranks(context: CalibrationContext, schemes: Schemes, kinds: Kinds, samples: Samples) -> Schemes:
    """The schemes with a rank for every layer, within the recipe's budget; the pipeline is still full precision."""
    layers, reach = _free_layers(context, schemes, samples), _sensitivities(context, schemes, samples)
    budget = RankBudget(context.recipe.layer.branch_budget, kinds, context.recipe.layer.bounds)
    ranks = ranks_within_budget(layers, reach, budget, context.progress)
    return _with(schemes, {name: replace(layers[name].scheme, rank=rank) for name, rank in ranks.items()})


def give_bits(context: CalibrationContext, schemes: Schemes, kinds: Kinds, samples: Samples) -> tuple[Schemes, Assignment]:
    """The schemes with bits and a rank for every layer, within the recipe's budget; the pipeline is still full precision.

    Raises:
        RecipeError: no assignment meets the budget; the message says the smallest one.
    """
    recipe, family = context.recipe, context.family
    layers, reach = _free_layers(context, schemes, samples), _sensitivities(context, schemes, samples)
    work = family.work(context.pipeline)
    choices: dict[str, list[Choice]] = {}
    with TensorStore(MEMORY_FOR_ACTIVATIONS) as store:
        image_errors = _ImageErrors(context, schemes, store)
        groups = image_errors.together(layers)
        found: dict[str, LayerErrors] = {}
        for name in follow(context.progress, [name for group in groups for name in group], "choose bits"):
            kind = kinds[isinstance(layers[name].layer, nn.Conv2d)]
            found[name] = errors_of_ways(layers[name], reach[name].weights, kind, recipe.layer)
            if len(found) == len(groups[0]):
                for each, errors in corrected(found, image_errors).items():
                    choices[each] = choices_of(each, layers[each], errors, work, context.bits)
                groups, found = groups[1:], {}
    choices = {name: choices[name] for name in layers}
    rest, total = _rest(context, schemes, layers, work)
    least = rest + sum(rows[0].size for rows in choices.values())
    size, (branch, wider) = _size_limit(recipe.budget, least, work.parameters), (recipe.budget.branch, recipe.budget.wider)
    if least > size:
        raise RecipeError(
            f"budget.bits is {recipe.budget.bits:g}, and the smallest assignment has {8 * least / work.parameters:.2f} bits a"
            f" weight, with all layers at w{context.bits[0]} and no branches: allow at least that, or choose fewer bits"
        )
    shares = (math.inf if share is None else share * total for share in (branch, wider))
    assignment = assign(choices, Limits(size - rest, *shares))
    curve = [(8 * (size + rest) / work.parameters, error) for size, error in assignment.curve]
    return _with(schemes, assignment.schemes), replace(assignment, size=assignment.size + rest, curve=curve)


def _size_limit(budget: Budget, least: int, parameters: int) -> float:
    """Bytes of the weight files at most."""
    if budget.extra_bits is not None:
        return least + budget.extra_bits * parameters / 8
    return math.inf if budget.bits is None else budget.bits * parameters / 8


def _rest(context: CalibrationContext, schemes: Schemes, layers: dict[str, RankedLayer], work: Work) -> tuple[int, int]:
    """Bytes of everything that is not free to choose, and the multiplications of all quantized layers."""
    size, total = 0, 0
    for component, model in context.family.models(context.pipeline).items():
        tensors = dict(model.state_dict())
        for name, (layer, scheme) in quantizable_layers(model, schemes[component]).items():
            positions, weights = work.layers[f"{component}.{name}"]
            total += positions.multiplications(weights)
            for part in ("weight", "bias"):
                tensors.pop(f"{name}.{part}", None)
            if f"{component}.{name}" not in layers:
                buffers = deployed_like(layer, scheme, "meta").named_buffers()
                tensors |= {f"{name}.{buffer}": tensor for buffer, tensor in buffers}
        size += stored_bytes(tensors, behind=work.parameters)
    return size, total


def _free_layers(context: CalibrationContext, schemes: Schemes, samples: Samples) -> dict[str, RankedLayer]:
    """The layers of which the recipe says neither bits nor rank, with the highest rank that they may get."""
    recipe = context.recipe
    return {
        f"{component}.{name}": RankedLayer(layer, replace(scheme, rank=recipe.layer.branch_rank), samples[f"{component}.{name}"])
        for component, model in context.family.models(context.pipeline).items()
        for name, (layer, scheme) in quantizable_layers(model, schemes[component]).items()
        if replace(scheme, rotation=schemes[component].default.rotation) == schemes[component].default
        and given_rank(recipe, f"{component}.{name}") is None
    }


class _ImageErrors:
    """Sum of squared errors of an image, averaged over a few, with layers of one block replaced in the full-precision network.

    The network runs only from the block on, with what was recorded of those before.
    """

    def __init__(self, context: CalibrationContext, schemes: Schemes, store: TensorStore):
        self.family, self.pipeline = context.family, context.pipeline
        names = {
            id(model): list(quantizable_layers(model, schemes[component]))
            for component, model in self.family.models(self.pipeline).items()
        }
        blocks = self.family.blocks(self.pipeline, lambda model: names[id(model)])
        self.blocks = {block.name: block for block in blocks}
        self.recording = Recording(self.family, self.pipeline, blocks, store)
        batch = next(_small_batches(context))
        self.large = _is_large(context)
        self.recording.add(batch[:1] if self.large else batch)

    def _block_of(self, name: str) -> Block:
        component, _, path = name.partition(".")
        model = self.family.models(self.pipeline)[component]
        return self.blocks[f"{component}.{outermost(model, path, self.family.block_kinds)}"]

    def together(self, names: Iterable[str]) -> list[list[str]]:
        """The layers that are measured together: each alone, or all of a block of a large network."""
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self._block_of(name).name if self.large else name, []).append(name)
        return list(groups.values())

    @torch.no_grad()
    def __call__(self, layers: dict[str, nn.Module]) -> float:
        (batch,), (wanted,) = self.recording.batches, self.recording.targets
        models, own = self.family.models(self.pipeline), {}
        block = self._block_of(next(iter(layers)))
        try:
            for name, layer in layers.items():
                component, _, path = name.partition(".")
                own[name] = models[component].get_submodule(path)
                replace_module(models[component], path, layer)
            with self.recording.replayed(0, block):
                image = self.family.run(self.pipeline, batch).image
        finally:
            for name, layer in own.items():
                component, _, path = name.partition(".")
                replace_module(models[component], path, layer)
        return float((image - wanted.image).square().sum()) / len(batch)


def _is_large(context: CalibrationContext) -> bool:
    models = context.family.models(context.pipeline).values()
    return sum(parameter.numel() for model in models for parameter in model.parameters()) > LARGE


def _small_batches(context: CalibrationContext) -> Iterator[torch.Tensor]:
    """Batches of small images, as they are in training."""
    family, side = context.family, min(context.recipe.image_size, SENSITIVITY_SIDE)
    for index in range(SENSITIVITY_BATCHES):
        rng = np.random.default_rng([context.seed, index])
        batch = family.training_batch(context.patches, SENSITIVITY_COUNT, side, context.degradation, rng)
        yield batch.to(context.device)


def _sensitivities(context: CalibrationContext, schemes: Schemes, samples: Samples) -> dict[str, Sensitivity]:
    """Of those layers, on a few small images."""
    family, pipeline = context.family, context.pipeline
    for model in family.models(pipeline).values():
        model.requires_grad_(False)
    layers = {name: ranked.layer for name, ranked in _free_layers(context, schemes, samples).items()}
    batches: Iterable[torch.Tensor] = _small_batches(context)
    if _is_large(context):  # one image at a time takes half the memory
        batches = (image for batch in batches for image in batch.split(1))
    return sensitivities(layers, lambda batch: family.run(pipeline, batch).image, batches)


def _with(schemes: Schemes, chosen: dict[str, LayerScheme]) -> Schemes:
    """The schemes with another one for some layers, by "component.layer"."""
    own: dict[str, dict[str, LayerScheme | None]] = {component: {} for component in schemes}
    for name, scheme in chosen.items():
        component, _, layer = name.partition(".")
        if scheme != schemes[component].default:
            own[component][layer] = scheme
    # In front, because the first match wins: a pattern of `keep` that asks for the stated bits leaves its layers free.
    return {c: replace(scheme, overrides={**own[c], **scheme.overrides, **own[c]}) for c, scheme in schemes.items()}
