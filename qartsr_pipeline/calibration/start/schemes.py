"""What a recipe asks of every layer of a full-precision pipeline: bits and ranks, from what the layers see."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
from diffusers import DiffusionPipeline

from qartsr_pipeline.calibration.family import family_of
from qartsr_pipeline.calibration.recipe import Recipe, parse_bits
from qartsr_pipeline.calibration.start.observers import InputSample, observe
from qartsr_pipeline.calibration.start.ranks import Budget, RankedLayer, ranks_within_budget
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.progress import follow
from qartsr_pipeline.quantization.calibrating import Kinds
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers

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
        ValueError: the pipeline is quantized already, or there is no quantizer of so many bits.
    """
    family = family_of(pipeline)
    models = family.models(pipeline)
    if any(getattr(model, "is_quantized", False) for model in models.values()):  # set by diffusers when it loads such a model
        raise ValueError("the model is quantized already; quantize the full-precision model that it was made from")
    default = LayerScheme(*bits, 0 if recipe.layer.branch_budget else recipe.layer.branch_rank)
    folding = family.fold(pipeline)
    schemes = {}
    for component, model in models.items():
        kept: dict[str, LayerScheme | None] = {}
        for pattern, text in family.kept(recipe).items():
            if pattern.startswith(f"{component}."):
                weights, activations = parse_bits(text)
                kept[pattern.removeprefix(f"{component}.")] = LayerScheme(max(weights, bits[0]), max(activations, bits[1]))
        plain = QuantizationScheme(default, kept)
        for name in quantizable_layers(model, plain):
            rank = given_rank(recipe, f"{component}.{name}")
            if rank is not None and plain.for_layer(name) == default:
                kept[name] = replace(default, rank=rank)
        schemes[component] = QuantizationScheme(default, kept, folding.get(component))
    return schemes


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
    return observe(layers, lambda batch: family.observe(pipeline, batch), followed)


def give_ranks(context: CalibrationContext, schemes: Schemes, kinds: Kinds, samples: Samples) -> Schemes:
    """The schemes with a rank for every layer, within the recipe's budget; the pipeline is still full precision."""
    family, pipeline, recipe = context.family, context.pipeline, context.recipe
    models = family.models(pipeline)
    layers = {
        f"{component}.{name}": RankedLayer(layer, replace(scheme, rank=recipe.layer.branch_rank), samples[f"{component}.{name}"])
        for component, model in models.items()
        for name, (layer, scheme) in quantizable_layers(model, schemes[component]).items()
        if scheme == schemes[component].default and given_rank(recipe, f"{component}.{name}") is None
    }
    for model in models.values():
        model.requires_grad_(False)
    side = min(recipe.image_size, SENSITIVITY_SIDE)
    generators = (np.random.default_rng([context.seed, index]) for index in range(SENSITIVITY_BATCHES))
    batches = (
        family.training_batch(context.patches, SENSITIVITY_COUNT, side, context.degradation, rng).to(context.device)
        for rng in generators
    )
    budget = Budget(recipe.layer.branch_budget, kinds, recipe.layer.bounds)
    ranks = ranks_within_budget(layers, lambda batch: family.run(pipeline, batch).image, batches, budget, context.progress)
    given = {component: dict(schemes[component].overrides) for component in models}
    for name, rank in ranks.items():
        component, _, layer = name.partition(".")
        if rank:
            given[component][layer] = replace(schemes[component].default, rank=rank)
    return {component: replace(schemes[component], overrides=given[component]) for component in models}
