"""Bits and ranks under a budget: what is tried, what is chosen, and what it costs in the end."""

from __future__ import annotations

import pytest
import torch
from recipes_for_tests import COMPONENTS, calibrated, picture, small_recipe
from torch import nn

from qartsr_pipeline.calibration.recipe import Layer, RecipeError
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_values
from qartsr_pipeline.calibration.start import schemes
from qartsr_pipeline.calibration.start.budget import Choice, Limits, assign, corrected, errors_of_ways, ways
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.calibration.start.ranks import RankedLayer
from qartsr_pipeline.calibration.start.schemes import _with
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.quantization.accounting import account
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_pipeline

W4A4, W8A8, BRANCH = LayerScheme(4, 4), LayerScheme(8, 8), LayerScheme(4, 4, 8)


def test_a_narrow_layer_gets_eight_bits_and_no_branch_as_dear_as_itself():
    narrow, wide = ways(LayerScheme(4, 4, 64), nn.Conv2d(16, 16, 1)), ways(LayerScheme(4, 4, 64), nn.Conv2d(64, 64, 3))
    assert narrow[0] == wide[0] == W4A4 and W8A8 in narrow and W8A8 in wide
    assert max(way.rank for way in narrow) == 0 and {way.rank for way in wide} == {0, 4, 8, 16}
    assert all(way.weight_bits >= 4 and way.activation_bits in (4, 8) for way in wide)
    assert ways(LayerScheme(8, 8), nn.Linear(64, 64)) == [W8A8]
    assert (
        LayerScheme(4, 8) in ways(LayerScheme(2, 2), nn.Linear(8, 8))
        and ways(LayerScheme(4, 16), nn.Linear(8, 8))[0].activation_bits == 16
    )


def test_a_choice_counts_also_where_keep_asks_for_the_stated_bits():
    """Such layers are free to choose, and the first pattern that matches a layer decides on it."""
    stated = QuantizationScheme(W8A8, {"conv*": W8A8, "head": LayerScheme(16, 16)})
    chosen = _with({"unet": stated}, {"unet.conv_in": LayerScheme(8, 8, 4), "unet.conv_out": W8A8})["unet"]
    assert chosen.for_layer("conv_in") == LayerScheme(8, 8, 4) and chosen.for_layer("conv_out") == W8A8
    assert chosen.for_layer("head") is None


def choice(scheme: LayerScheme, error: float, size: int, branch: int = 0, wider: int = 0) -> Choice:
    return Choice(scheme, error, size, branch, wider)


def test_the_best_assignment_within_all_limits():
    choices = {
        "a": [choice(W4A4, 10, 100), choice(BRANCH, 4, 150, branch=10), choice(W8A8, 1, 200, wider=50)],
        "b": [choice(W4A4, 9, 100), choice(BRANCH, 2, 150, branch=10), choice(W8A8, 1, 200, wider=50)],
    }
    assert assign(choices, Limits(200, 100, 100)).schemes == {"a": W4A4, "b": W4A4}
    assert assign(choices, Limits(1000, 1000, 1000)).schemes == {"a": W8A8, "b": W8A8}
    assert assign(choices, Limits(1000, 10, 50)).schemes == {"a": W8A8, "b": BRANCH}
    found = assign(choices, Limits(1000, 10, 0))
    assert found.schemes == {"a": W4A4, "b": BRANCH} and (found.error, found.size) == (12, 250)
    assert found.curve == [(200, 19.0), (250, 12.0)]
    with pytest.raises(ValueError, match="more than"):
        assign(choices, Limits(199, 0, 0))


def test_what_the_image_really_loses_corrects_the_other_errors_of_a_layer():
    torch.manual_seed(0)
    plain = nn.Conv2d(16, 16, 3, padding=1)
    ranked = RankedLayer(plain, LayerScheme(4, 4, 8), observe({"": plain}, plain, [torch.randn(2, 16, 16, 16)])[""])

    def errors(factor: float) -> dict[LayerScheme, float]:
        def measured(layer: nn.Module) -> float:
            assert isinstance(layer, CalibratingConv2d) and not layer.has_branch
            return factor * as_predicted[W4A4]

        found = errors_of_ways(ranked, torch.ones(16), CalibratingConv2d, Layer(bounds="mse", branch_rank=8))
        return corrected({"": found}, lambda layers: measured(layers[""]))[""]

    as_predicted = {W4A4: 1.0}
    scale = errors(1e-9)[W4A4]  # 100 times less than predicted, at most
    as_predicted = {W4A4: 100 * scale}
    once, thrice = errors(1.0), errors(3.0)
    fine = {way for way in once if way.activation_bits == 8}
    assert all(thrice[way] == pytest.approx(once[way] * (1 if way in fine else 3)) for way in once)
    assert fine and once[LayerScheme(4, 4, 4)] < once[W4A4]


def test_a_large_network_is_measured_a_block_at_a_time(monkeypatch):
    counts: list[int] = []
    recipe = small_recipe("steps=0", "layer.branch_rank=8", "budget={extra_bits: 1.5, branch: 0.05, wider: 0.2}")
    usual = schemes._ImageErrors.__call__
    monkeypatch.setattr(schemes._ImageErrors, "__call__", lambda self, layers: counts.append(len(layers)) or usual(self, layers))
    monkeypatch.setattr(schemes, "LARGE", 0)
    _, result = calibrated(recipe)
    assert max(counts) > 1 and sum(counts) > 2 * len(counts)
    assert result.curve[-1][1] < result.curve[0][1] and result.curve[-1][0] <= result.curve[0][0] + 1.5


def test_a_budget_is_kept_and_lowers_the_error():
    wanted = picture(build_tiny_pipeline())[0]
    plain = picture(calibrated(small_recipe("steps=0", "budget={extra_bits: 0, branch: 0, wider: 0}"))[0])[0]
    recipe = small_recipe("steps=0", "layer.branch_rank=8", "budget={extra_bits: 1.5, branch: 0.05, wider: 0.2}")
    pipeline, result = calibrated(recipe)
    assert psnr_y(picture(pipeline)[0], wanted) > psnr_y(plain, wanted)
    least, end = result.curve[0], result.curve[-1]
    assert least[0] < end[0] <= least[0] + 1.5 and end[1] < least[1]
    for component in COMPONENTS:
        freeze(getattr(pipeline, component), result.schemes[component])
    costs = account(pipeline.unet, pipeline.vae)
    assert costs.stated == "w4a4" and costs.bits == pytest.approx(end[0], rel=0.02)
    assert costs.bits <= end[0] <= least[0] + 1.5  # offsets in headers are as long as they are taken for, or shorter
    codes = {kind: count for kind, count in costs.multiplications.items() if kind.startswith("w")}
    assert costs.branch_cost <= 0.05 and {"w4a4"} < set(codes)
    assert torch.isfinite(picture(pipeline)).all()


def test_a_budget_below_the_smallest_assignment_says_which_that_is():
    with pytest.raises(RecipeError, match=r"budget.bits is 3, and the smallest assignment has \d+\.\d\d bits a weight"):
        calibrated(small_recipe("steps=0", "budget.bits=3"))


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(RecipeError, match="both bits and extra_bits"):
        small_recipe("budget={bits: 5, extra_bits: 1}")
    with pytest.raises(RecipeError, match="both decide on ranks"):
        small_recipe("budget={bits: 5}", "layer.branch_budget=0.1")
    with pytest.raises(RecipeError, match="budget.wider is 2, expected a number from 0 to 1"):
        small_recipe("budget.wider=2")
    with pytest.raises(RecipeError, match="budget counts what is stored"):
        with_values(load_recipe("svdquant"), ["budget.bits=5"])


def test_patterns_that_contradict_each_other_are_refused():
    with pytest.raises(RecipeError, match=r"keep.unet.conv_\* is w6a6, but the patterns before it .* keep.unet.conv_\w+: w8a8"):
        calibrated(small_recipe("steps=0", "keep.unet.conv_*=w6a6"))
