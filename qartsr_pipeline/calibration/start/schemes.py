"""What a recipe asks of every layer of a full-precision pipeline: bits and ranks, from what the layers see."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.pairs import SCALE, Patches, sample_pair
from qartsr_pipeline.calibration.recipe import Recipe, parse_bits
from qartsr_pipeline.calibration.start.observers import InputSample, observe
from qartsr_pipeline.calibration.start.ranks import ranks_within_budget
from qartsr_pipeline.calibration.training.preparation import Preparation
from qartsr_pipeline.quantization.calibrating import Kinds
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers

COMPONENTS = ("unet", "vae")


def given_rank(recipe: Recipe, name: str) -> int | None:
    """The rank that the recipe itself gives to "component.layer", None where it leaves it to the rule for all."""
    return next((rank for pattern, rank in recipe.layer.branch_ranks.items() if fnmatchcase(name, pattern)), None)


def fold_and_make_schemes(pipeline: QArtSRPipeline, recipe: Recipe, bits: tuple[int, int]) -> dict[str, QuantizationScheme]:
    """Folds the UNet's constants in place, and gives the schemes of UNet and VAE.

    Layers that the recipe keeps at more bits have no low-rank branch. Where ranks are under a budget, `give_ranks` gives them.

    Raises:
        ValueError: the pipeline is quantized already, or there is no quantizer of so many bits.
    """
    if any(getattr(getattr(pipeline, name), "is_quantized", False) for name in COMPONENTS):
        raise ValueError("the model is quantized already; quantize the full-precision model that it was made from")
    default = LayerScheme(*bits, 0 if recipe.layer.branch_budget else recipe.layer.branch_rank)
    folding = fold(pipeline.unet, pipeline.config.timestep, pipeline.prompt_embedding(1))
    schemes = {}
    for component in COMPONENTS:
        kept = {}
        for pattern, text in recipe.keep.items():
            if pattern.startswith(f"{component}."):
                weights, activations = parse_bits(text)
                kept[pattern.removeprefix(f"{component}.")] = LayerScheme(max(weights, bits[0]), max(activations, bits[1]))
        plain = QuantizationScheme(default, kept)
        for name in quantizable_layers(getattr(pipeline, component), plain):
            rank = given_rank(recipe, f"{component}.{name}")
            if rank is not None and plain.for_layer(name) == default:
                kept[name] = replace(default, rank=rank)
        schemes[component] = QuantizationScheme(default, kept, folding if component == "unet" else None)
    return schemes


def observe_full_precision(
    pipeline: QArtSRPipeline,
    schemes: dict[str, QuantizationScheme],
    recipe: Recipe,
    patches: Patches,
    seed: int,
    degradation: str,
    preparation: Preparation,
) -> dict[str, InputSample]:
    """ "component.layer" -> sample of its input over the recipe's calibration pictures; the pipeline is still full precision."""
    layers = {
        f"{component}.{name}": layer
        for component in COMPONENTS
        for name, (layer, _) in quantizable_layers(getattr(pipeline, component), schemes[component]).items()
    }
    rng = np.random.default_rng(seed)
    batches = [
        DEGRADATIONS[degradation](patches.sample(min(4, recipe.images - start), recipe.image_size, rng), SCALE, rng)
        for start in range(0, recipe.images, 4)
    ]
    followed = preparation.follow(batches, "observe", "batch")
    return observe(layers, lambda low: pipeline(low, color_fix=None, output_type="pt"), followed)


def give_ranks(
    pipeline: QArtSRPipeline,
    schemes: dict[str, QuantizationScheme],
    recipe: Recipe,
    kinds: Kinds,
    samples: dict[str, InputSample],
    patches: Patches,
    seed: int,
    degradation: str,
    preparation: Preparation,
) -> dict[str, QuantizationScheme]:
    """The schemes with a rank for every layer, within the recipe's budget; the pipeline is still full precision."""
    layers = {
        f"{component}.{name}": (layer, replace(scheme, rank=recipe.layer.branch_rank))
        for component in COMPONENTS
        for name, (layer, scheme) in quantizable_layers(getattr(pipeline, component), schemes[component]).items()
        if scheme == schemes[component].default and given_rank(recipe, f"{component}.{name}") is None
    }
    for component in COMPONENTS:
        getattr(pipeline, component).requires_grad_(False)
    side, device = min(recipe.image_size, 128), pipeline.vae.device
    batches = (
        sample_pair(patches, 2, side, np.random.default_rng([seed, index]), degradation)[0].to(device) for index in range(4)
    )
    budget, bounds = recipe.layer.branch_budget, recipe.layer.bounds
    ranks = ranks_within_budget(pipeline, layers, kinds, samples, batches, budget, bounds, preparation)
    given = {component: dict(schemes[component].overrides) for component in COMPONENTS}
    for name, rank in ranks.items():
        component, _, layer = name.partition(".")
        if rank:
            given[component][layer] = replace(schemes[component].default, rank=rank)
    return {component: replace(schemes[component], overrides=given[component]) for component in COMPONENTS}
