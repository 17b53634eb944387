"""Rounding on patches: errors of taps and channels make up for each other, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from recipes_for_tests import COMPONENTS, calibrated, picture, small_recipe
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.recipe import RecipeError
from qartsr_pipeline.calibration.start import branches, rounding
from qartsr_pipeline.calibration.start import initialise as initialise_module
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, relative_output_error
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.calibration.start.rounding import relative_patch_error, round_together
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme


def smooth_maps(count: int, channels: int, side: int) -> torch.Tensor:
    """As in images, neighbours are nearly equal; (count, channels, side, side)."""
    return nn.functional.interpolate(torch.randn(count, channels, side // 4, side // 4), (side, side), mode="bilinear").relu()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolutions_output_is_closer_on_inputs_that_were_not_seen(bits, stride):
    torch.manual_seed(0)
    plain = nn.Conv2d(12, 16, 3, stride, 1)
    sample = observe({"": plain}, plain, [smooth_maps(4, 12, 32) for _ in range(4)], windows=True)[""]
    assert sample.windows and sample.together.shape[1] == 12
    layer = CalibratingConv2d.from_layer(plain, LayerScheme(bits, 8), adapter_rank=16)
    initialise({"": layer}, {"": sample}, Initialisation(smoothing=(0.5,)))
    unseen, weight = smooth_maps(8, 12, 32), layer.weight.clone()
    before, seen_before = relative_patch_error(layer, unseen), relative_output_error(layer, sample)
    assert round_together(layer, sample.together)
    after = relative_patch_error(layer, unseen)
    assert after < (0.7 if bits < 8 else 1.0) * before and relative_output_error(layer, sample) < seen_before
    assert torch.equal(layer.weight, weight)
    with torch.no_grad():  # that is the layer's own error, but for borders
        difference = layer(unseen) - plain(unseen)
        power = (plain(unseen) - plain.bias.view(-1, 1, 1)).square().sum()
    assert float(difference.square().sum() / power) == pytest.approx(after, rel=0.5)


def test_what_inputs_lose_is_made_up_for():
    """With inputs of 2 bits most of the error is theirs, and a weight without any rounding would leave more of it."""
    torch.manual_seed(0)
    plain = nn.Conv2d(12, 16, 3, padding=1)
    sample = observe({"": plain}, plain, [smooth_maps(4, 12, 32) for _ in range(4)], windows=True)[""]
    errors = {}
    for bits in (8, 16):
        layer = CalibratingConv2d.from_layer(plain, LayerScheme(bits, 2), adapter_rank=16)
        initialise({"": layer}, {"": sample}, Initialisation(smoothing=(0.5,)))
        if bits == 8:
            assert round_together(layer, sample.together) and layer.bias_change.abs().max() > 0
        errors[bits] = relative_patch_error(layer, smooth_maps(8, 12, 32))
    assert errors[8] < 0.9 * errors[16]


@pytest.mark.parametrize("bits", [(4, 4), (2, 2)])
@pytest.mark.parametrize("plain", [nn.Conv2d(24, 16, 3, padding=1), nn.Linear(160, 24)])
def test_in_groups_of_columns_it_is_nearly_as_good(plain, bits, monkeypatch):
    """And so is what large layers start from otherwise: products of bytes, and a smoothing that is chosen before the fit."""
    torch.manual_seed(0)
    maps = (
        [smooth_maps(4, 24, 32) for _ in range(4)]
        if isinstance(plain, nn.Conv2d)
        else [torch.randn(512, 30) @ torch.randn(30, 160)]
    )
    sample = observe({"": plain}, plain, maps, windows=True)[""]
    kind, options = CalibratingConv2d if isinstance(plain, nn.Conv2d) else CalibratingLinear, {"branch_fit": True}
    errors = {}
    for rounding_of in ("nearest", "patches", "patches in groups"):
        if rounding_of == "patches in groups":
            for name, value in (("MOST_COLUMNS", 100), ("GROUP", 70)):
                monkeypatch.setattr(rounding, name, value)
            for module in (branches, initialise_module):
                monkeypatch.setattr(module, "LARGE", 1)
        torch.manual_seed(1)
        layer = kind.from_layer(plain, LayerScheme(*bits, rank=2), adapter_rank=24)
        initialise({"": layer}, {"": sample}, Initialisation(rounding=rounding_of.split()[0], **options))
        errors[rounding_of] = relative_output_error(layer, sample)
    assert errors["patches"] < errors["nearest"]
    assert errors["patches in groups"] < 0.2 * errors["nearest"] + 0.8 * errors["patches"]


def test_maps_below_the_kernel_are_rounded_to_the_nearest():
    torch.manual_seed(0)
    plain = nn.Conv2d(12, 16, 3, padding=1)
    sample = observe({"": plain}, plain, [torch.randn(4, 12, 2, 2)], windows=True)[""]
    layer = CalibratingConv2d.from_layer(plain, LayerScheme(4, 4), adapter_rank=16)
    assert 0 < initialise({"": layer}, {"": sample}, Initialisation(rounding="patches"))[""] < 0.1


def test_it_is_taken_back_where_it_does_not_help():
    torch.manual_seed(0)
    plain = nn.Linear(32, 24)
    x = torch.randn(64, 32)
    sample = observe({"": plain}, plain, [x])[""]
    layer = CalibratingLinear.from_layer(plain, LayerScheme(4, 16), adapter_rank=1)  # cannot hold the rounding
    initialise({"": layer}, {"": sample}, Initialisation(smoothing=()))
    before = {name: value.clone() for name, value in layer.named_parameters()}
    kept = round_together(layer, sample.together)
    same = all(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    assert kept is not same


def test_a_whole_model_is_rounded_and_stored(tmp_path):
    pipeline, result = calibrated(small_recipe("steps=0", "layer.rounding=patches", "layer.adapter_rank=32"))
    _, nearest = calibrated(small_recipe("steps=0"))
    assert sum(result.errors_before.values()) < sum(nearest.errors_before.values())
    for component in COMPONENTS:
        freeze(getattr(pipeline, component), result.schemes[component])
    pipeline.save_pretrained(tmp_path / "model")
    loaded = QArtSRPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(picture(loaded), picture(pipeline))


def test_what_it_needs_is_said():
    with pytest.raises(RecipeError, match="layer.rounding: patches needs an adapter_rank"):
        small_recipe("layer.rounding=patches", "layer.adapter_rank=0", "stages.0.train=[bounds]", "stages.1.train=[bounds]")
