"""Reading recipes from YAML, and changing single values of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from qartsr_pipeline.calibration.arguments import RECIPES, recipe_names
from qartsr_pipeline.calibration.recipe import Recipe, RecipeError, Stage


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name in `recipes/`, or a YAML file.

    Raises:
        RecipeError: none of that name, not YAML, or not valid; the message names the file.

    Example:
        >>> from dataclasses import replace
        >>> from qartsr_pipeline import load_recipe
        >>> recipe = replace(load_recipe("qartsr"), steps=100)  # a recipe with one value changed, for `quantize`
        >>> recipe.method, [stage.name for stage in recipe.stages]
        ('QArtSR', ['RPQ', 'ET'])
    """
    path = RECIPES / f"{name}.yaml" if re.fullmatch(r"[\w-]+", str(name)) else Path(name)
    if not path.is_file():
        raise RecipeError(f"there is no recipe {str(name)!r}; there are {', '.join(recipe_names())}, or give a YAML file")
    try:
        return Recipe.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (RecipeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: {' '.join(str(error).split())}") from error


def with_values(recipe: Recipe, assignments: list[str]) -> Recipe:
    """The recipe with some values changed.

    Args:
        assignments: "KEY=VALUE" with keys such as steps, layer.branch_rank or stages.0.lr, values in YAML.

    Raises:
        RecipeError: a key that does not exist or a value that it cannot have.
    """
    data = recipe.to_dict()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f"{assignment!r} is not of the form KEY=VALUE, such as stages.0.lr=1e-2")
        try:
            _assign(data, key.split("."), _value(text))
        except (KeyError, IndexError, ValueError, TypeError, yaml.YAMLError):
            raise RecipeError(f"{assignment}: no such key") from None
    return Recipe.from_dict(data)  # checked once all values are there: they may need each other


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 takes 1e-2 for text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _assign(node: Any, keys: list[str], value: Any) -> None:
    """Sets ``node[keys[0]][keys[1]]..``; raises KeyError, IndexError, TypeError or ValueError where there is no such place."""
    if keys[0] in ("keep", "branch_ranks", "rates") and len(keys) > 1:
        node[keys[0]][".".join(keys[1:])] = value  # layer patterns hold dots
        return
    key = int(keys[0]) if isinstance(node, list) else keys[0]
    if len(keys) > 1:
        _assign(node[key], keys[1:], value)
    else:
        node[key]  # noqa: B018 - must be there already
        node[key] = value


def with_perceptual(recipe: Recipe, kind: str) -> Recipe:
    """The recipe for a run whose perceptual loss is "lpips", or another: one weight remains, under the name ``perceptual``.

    Raises:
        RecipeError: a stage has a weight for LPIPS alone, and the kind is another.
    """
    return replace(recipe, stages=tuple(_with_one_weight(stage, kind) for stage in recipe.stages))


def _with_one_weight(stage: Stage, kind: str) -> Stage:
    if "lpips" not in stage.loss:
        return stage
    loss = {term: weight for term, weight in stage.loss.items() if term != "lpips"}
    if kind == "lpips":
        loss["perceptual"] = stage.loss["lpips"]
    elif "perceptual" not in loss:
        raise RecipeError(f"stage {stage.name!r}: loss has lpips alone, and the perceptual loss is {kind}: give perceptual, too")
    return replace(stage, loss=loss)
