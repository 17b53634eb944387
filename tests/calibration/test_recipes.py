"""The recipes that come with the project: each is what its publication says, as far as a recipe can say it."""

from __future__ import annotations

import pytest

from qartsr_pipeline.calibration.arguments import recipe_names
from qartsr_pipeline.calibration.recipe import Recipe, RecipeError
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_perceptual, with_values
from qartsr_pipeline.calibration.start.initialise import Initialisation
from qartsr_pipeline.calibration.start.other_grids import layer_kinds

METHODS = {
    "maxmin": "MaxMin",
    "lsq": "LSQ",
    "q_dm": "Q-DM",
    "efficientdm": "EfficientDM",
    "passionsr": "PassionSR",
    "svdquant": "SVDQuant",
    "qartsr": "QArtSR",
}
TRAINED = {
    "maxmin": set(),
    "lsq": {"step"},
    "q_dm": {"step"},
    "efficientdm": {"adapter", "step"},
    "passionsr": {"smoothing", "offset", "bounds"},
    "svdquant": set(),
    "qartsr": {"smoothing", "branch", "adapter", "bias", "bounds"},
}
DEPLOYABLE = {"maxmin", "lsq", "efficientdm", "qartsr"}


def test_every_method_has_a_recipe():
    assert set(METHODS) <= set(recipe_names())


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_says_what_it_is_and_can_be_carried_out(name):
    recipe = load_recipe(name)
    assert recipe.method == METHODS[name]
    assert recipe.source and len(recipe.reading) > 40
    assert {part for stage in recipe.stages for part in stage.train} == TRAINED[name]
    assert recipe.layer.deployable == (name in DEPLOYABLE)
    assert recipe.steps == (350 if recipe.stages else 0)
    assert sum(stage.share for stage in recipe.stages) == pytest.approx(1 if recipe.stages else 0)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    layer_kinds(recipe.layer, any("step" in stage.train for stage in recipe.stages))
    Initialisation.of(recipe.layer)


def test_what_is_the_same_for_all_is_the_same():
    """Data, layers kept at 8 bits, patches a step: the comparison is fair or worthless."""
    recipes = [load_recipe(name) for name in METHODS]
    assert len({str((r.keep, r.images, r.image_size)) for r in recipes}) == 1
    for end_to_end in (True, False):
        stages = [s for r in recipes for s in r.stages if (s.modules == "all") == end_to_end]
        assert len({(s.patch, s.batch) for s in stages}) == 1
    assert len({r.layer.adapter_rank for r in recipes} - {0}) == 1


def test_the_baselines_are_on_their_own_grids():
    svdquant = load_recipe("svdquant").layer
    assert (svdquant.group_size, svdquant.activations, svdquant.branch_rank, svdquant.smoothing) == (64, "dynamic", 32, "search")
    first, second = load_recipe("passionsr").stages
    assert first.modules == second.modules == "parts" and first.others == second.others == "full_precision"
    assert set(first.train) == {"smoothing", "offset"} and set(second.train) == {"bounds"}


def test_lpips_has_a_weight_of_its_own():
    recipe = with_values(load_recipe("qartsr"), ["stages.1.loss={image_l2: 1.0, perceptual: 0.01, lpips: 0.5}"])
    assert recipe.is_perceptual
    for kind, weight in (("encoder", 0.01), ("lpips", 0.5)):
        assert with_perceptual(recipe, kind).stages[1].loss == {"image_l2": 1.0, "perceptual": weight}
    assert with_perceptual(recipe, "lpips").stages[0] == recipe.stages[0]
    alone = with_values(recipe, ["stages.1.loss={image_l2: 1.0, lpips: 0.5}"])
    assert with_perceptual(alone, "lpips").stages[1].loss["perceptual"] == 0.5
    with pytest.raises(RecipeError, match="'ET': loss has lpips alone, and the perceptual loss is encoder"):
        with_perceptual(alone, "encoder")
