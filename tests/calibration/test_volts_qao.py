"""VOLTS and QAO: which layers are trained for how long, and that training a layer brings it closer to full precision."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from qartsr_pipeline import LSGQuantVideoPipeline, load_recipe, quantize
from qartsr_pipeline.calibration.recipe import Recipe, RecipeError, Stage
from qartsr_pipeline.calibration.recipe_layers import Layer, Volts
from qartsr_pipeline.calibration.start.branches import fit_branch
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, relative_output_error
from qartsr_pipeline.calibration.start.observers import InputSample, observe
from qartsr_pipeline.calibration.start.rounding import round_together
from qartsr_pipeline.calibration.training.steps import ColumnAdam
from qartsr_pipeline.calibration.training.volts import classified, planned_steps, sensitivity
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.scheme import LayerScheme
from qartsr_pipeline.quantization.token_layers import TokenLinear
from tiny_models import build_tiny_video_pipeline

VIDEO_RECIPES = ("minmax", "smoothquant", "quarot", "vidit_q", "svdquant_token", "quantvsr", "lsgquant")


def clips(count: int = 3, frames: int = 5, side: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Smooth shapes that drift, with some grain, each of another brightness; uint8 (F, H, W, 3)."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    made = []
    for index in range(count):
        phase, grain = rng.random(3) * 6, rng.normal(0, 0.05, (side, side, 3))
        moved = [np.sin((rows * 0.3 + columns * 0.2 + time * 0.4)[..., None] + phase) * 0.2 + grain for time in range(frames)]
        made.append(((0.3 + 0.2 * index + np.stack(moved)).clip(0, 1) * 255).round().astype(np.uint8))
    return made


def small(recipe: Recipe, **changes) -> Recipe:
    """On few small images, and of the transformer alone."""
    return replace(recipe, **{"images": 15, "image_size": 64, "keep": {"vae.*": "w16a16"}} | changes)


def layer_and_sample(rank: int = 4, positions: int = 600) -> tuple[TokenLinear, InputSample]:
    """A layer whose inputs have a few directions that are much larger than the others."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0.5, -1, 64)[:, None]
    rows = torch.randn(positions, 64, generator=generator) @ mixing
    sample = InputSample()
    sample.add(rows, positions, generator)
    layer = TokenLinear.from_layer(linear, LayerScheme(4, 4, rank, "token", 64))
    layer.train_residual()
    return layer, sample


def test_sensitivity_is_the_variance_of_the_mean_over_clips():
    means = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0]), torch.tensor([5.0, 5.0])]
    channel = np.var([1, 3, 5])
    assert sensitivity(means, "channels") == pytest.approx(channel / 2)
    assert sensitivity(means, "scalar") == pytest.approx(np.var([3, 4, 5]))
    assert sensitivity(means[:1], "channels") == 0


def test_observers_keep_the_mean_of_each_clip():
    layer = nn.Linear(3, 2)
    batches = [torch.randn(4, 5, 3) + index for index in range(3)]
    samples = observe({"layer": layer}, lambda batch: (layer(batch[:2]), layer(batch[2:])), batches)
    for mean, batch in zip(samples["layer"].means, batches, strict=True):
        assert torch.allclose(mean, batch.mean((0, 1)), atol=1e-6)


def sampled(value: float) -> InputSample:
    return InputSample(means=[torch.tensor([0.0]), torch.tensor([2 * value**0.5])])


def test_classes_by_percentile_and_by_value():
    samples = {str(index): sampled(10.0**index) for index in range(-4, 5)}
    found = classified(samples, Volts())
    assert [found[str(index)]["kind"] for index in range(-4, 5)] == ["low"] * 3 + ["medium"] * 3 + ["high"] * 3
    found = classified(samples, Volts(rule="absolute", low=0.001, high=0.075))
    assert [found[str(index)]["kind"] for index in (-4, -2, -1, 4)] == ["low", "medium", "high", "high"]
    assert found["-4"]["value"] == pytest.approx(1e-4)


def test_steps_keep_to_the_budget():
    kinds, volts = ["high", "high", "medium", "low"], Volts(low_steps=1, medium_steps=30)
    assert planned_steps(kinds, 191, volts) == [80, 80, 30, 1]
    assert planned_steps(kinds, 91, volts) == [30, 30, 30, 1]
    short = planned_steps(kinds, 45, volts)
    assert sum(short) <= 45 and short[0] == short[2] > short[3]
    assert planned_steps(["low", "medium"], 1000, volts) == [1, 30] and planned_steps(kinds, 0, volts) == [0] * 4


def test_fitted_branch_leaves_the_quantized_weight_as_it_is():
    layer, sample = layer_and_sample()
    initialise({"layer": layer}, {"layer": sample}, Initialisation(smoothing=()))
    weight, error = layer.qweight.clone(), relative_output_error(layer, sample)
    fit_branch(layer, sample.rows)
    assert torch.allclose(layer.qweight, weight, atol=1e-2 * float(weight.detach().abs().max()))
    assert (layer.qweight - weight).abs().mean() < 1e-3 * weight.abs().mean() and relative_output_error(layer, sample) < error


def test_rounding_together_works_on_rotated_layers():
    layer, sample = layer_and_sample()
    initialise({"layer": layer}, {"layer": sample}, Initialisation())
    error = relative_output_error(layer, sample)
    assert round_together(layer, sample.rows) and relative_output_error(layer, sample) < 0.95 * error
    assert layer.weight_change.abs().max() > 0


def test_steps_follow_the_channels_phi():
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in range(3)]
    columns = torch.tensor([1.0, 0.1, 10.0])
    for group in ({}, {"columns": columns}):
        optimizer = ColumnAdam([{"params": [parameters[len(group)]], "lr": 0.01, **group}])
        parameters[len(group)].grad = torch.arange(6.0).view(2, 3) + 1
        optimizer.step()
    plain = torch.optim.Adam([parameters[2]], lr=0.01)
    parameters[2].grad = torch.arange(6.0).view(2, 3) + 1
    plain.step()
    assert torch.equal(parameters[0], parameters[2])
    assert torch.allclose(parameters[1] - 1, (parameters[2] - 1) * columns, atol=1e-6)


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """Quantized by the recipe, with few steps."""
    recipe = load_recipe("lsgquant")
    stages = tuple(replace(stage, patch=32) for stage in recipe.stages)
    rounds = replace(recipe.volts, medium_steps=12, converged=0.0)  # short ones, so that layers have several
    recipe = small(recipe, steps=200, layer=replace(recipe.layer, branch_rank=4), stages=stages, volts=rounds)
    output = tmp_path_factory.mktemp("runs") / "run"
    result = quantize(
        build_tiny_video_pipeline(), "w4a4", clips(), recipe=recipe, evaluation_data=clips(1, seed=1), output=output
    )
    return result, recipe, output


def test_qao_lowers_errors_of_the_layers_that_volts_chose(refined):
    result, _, output = refined
    assert result.finished
    record = json.loads((output / "model" / "quantization.json").read_text())
    found = record["sensitivities"]
    spent = len(record["loss"]["QAO"])
    assert sorted(found) == sorted(name for name in (row.name for row in result.layers) if name.startswith("transformer."))
    assert sum(row["steps"] for row in found.values()) == spent <= 196 and len(record["loss"]["together"]) == 4
    assert all(row["steps"] <= 1 for row in found.values() if row["kind"] == "low")
    turns = [turn for turn in record["modules"] if turn["stage"] == "QAO"]
    assert all(turn["last"] <= turn["first"] for turn in turns)
    assert np.mean([turn["last"] / turn["first"] for turn in turns]) < 0.99
    values = [found[turn["module"]]["value"] for turn in turns]
    assert values == sorted(values, reverse=True)


def test_report_shows_sensitivities_and_film_strips(refined):
    result, _, output = refined
    page = result.report.read_text()
    assert "Sensitivity of each layer" in page and "Film strips" in page
    written = json.loads((output / "report" / "sensitivities.json").read_text())
    assert written == json.loads((output / "model" / "quantization.json").read_text())["sensitivities"]
    assert (output / "report" / "strip-1.png").is_file()


def test_what_was_trained_is_what_is_deployed(refined):
    result, _, output = refined
    loaded = LSGQuantVideoPipeline.from_pretrained(output / "model")
    layers = [module for module in loaded.transformer.modules() if isinstance(module, DeployedLayer)]
    assert len(layers) == 2 * 7 + 1 and all(layer.spec.grid == "token" for layer in layers)
    video = clips(1, 5, 16)[0]
    made, again = (pipe(video, output_type="np").frames for pipe in (result.pipeline, loaded))
    assert np.abs(made - again).max() < 1e-3


def test_a_stopped_run_goes_on_to_the_same_result(refined, tmp_path):
    result, recipe, output = refined
    arguments = {"recipe": recipe, "evaluation_data": clips(1, seed=1), "output": tmp_path / "run"}
    for at in (3, 30):  # in the middle of layers
        stopped = quantize(build_tiny_video_pipeline(), "w4a4", clips(), callback=lambda step, *_, at=at: step >= at, **arguments)
        assert not stopped.finished
    whole = quantize(build_tiny_video_pipeline(), "w4a4", clips(), **arguments)
    assert whole.finished and [row.after for row in whole.layers] == [row.after for row in result.layers]
    assert whole.record["sensitivities"] == result.record["sensitivities"]


def test_recipes_of_video_are_on_the_token_grid():
    for name in VIDEO_RECIPES:
        recipe = load_recipe(name)
        assert recipe.layer.activations == "token" and recipe.layer.deployable and recipe.reading, name


@pytest.mark.parametrize("name", ["vidit_q", "svdquant_token", "quantvsr"])
def test_recipes_run(name):
    recipe, layer = load_recipe(name), load_recipe(name).layer
    recipe = small(replace(recipe, layer=replace(layer, branch_rank=min(4, layer.branch_rank))), images=5)
    result = quantize(
        build_tiny_video_pipeline(), "w6a6", clips(side=96), recipe=recipe, evaluation_data=clips(1, side=32, seed=1)
    )
    assert result.finished and len(result.layers) == 15 and max(row.after for row in result.layers) < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"layer": Layer(residual=True)}, "residual"),
        (lambda: {"layer": Layer(rotation="online")}, "online needs activations: token"),
        (lambda: {"layer": Layer(activations="token", residual=True, adapter_rank=4)}, "residual"),
        (lambda: {"stages": (Stage("a", train=("residual",)),), "steps": 1}, "trains residual"),
    ],
)
def test_recipes_that_do_not_fit_together_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        Recipe("test", "none", **changes())


@pytest.mark.parametrize(
    "changes",
    [{"order": "reversed"}, {"others": "quantized_so_far"}, {"loss": {"image_l2": 1.0}}, {"modules": "all"}],
)
def test_stages_of_layers_are_checked(changes):
    good = {"modules": "layers", "order": "sensitive", "others": "full_precision", "loss": {"module_l2": 1.0}}
    Stage("layers", **good)
    with pytest.raises(RecipeError):
        Stage("layers", **good | changes)


@pytest.mark.parametrize("changes", [{"reading": "mean"}, {"rule": "share"}, {"low": 80.0}, {"high": 101.0}, {"medium_steps": 0}])
def test_volts_is_checked(changes):
    with pytest.raises(RecipeError, match="volts"):
        Volts(**changes)
