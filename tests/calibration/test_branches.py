"""A fitted branch is the best there is for the layer's outputs, and leaves the quantized weight alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qartsr_pipeline.calibration.recipe import Layer, RecipeError
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_values
from qartsr_pipeline.calibration.start import initialise as initialise_module
from qartsr_pipeline.calibration.start.branches import fit_branch, leading_vectors, left_by_quantization
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, squared_errors
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear, CalibratingMixin
from qartsr_pipeline.quantization.scheme import LayerScheme


def layer_and_rows(convolution: bool, rank: int, adapter: int = 0, fit: bool = False) -> tuple[CalibratingMixin, torch.Tensor]:
    """A layer whose parameters are set, and a sample of its input, whose channels depend on each other."""
    torch.manual_seed(0)
    plain = nn.Conv2d(8, 6, 3, padding=1) if convolution else nn.Linear(8, 6)
    x = torch.einsum("pc,cd->pd", torch.randn(1024, 8), torch.randn(8, 8)) + 1
    x = x.T.reshape(1, 8, 32, 32) if convolution else x
    sample = observe({"": plain}, plain, [x], positions=1024)[""]
    kind = CalibratingConv2d if convolution else CalibratingLinear
    layer = kind.from_layer(plain, LayerScheme(2, 8, rank), adapter)
    initialise({"": layer}, {"": sample}, Initialisation(branch_fit=fit))
    layer.requires_grad_(False)
    return layer, sample.rows


def error_of(layer: CalibratingMixin, rows: torch.Tensor) -> float:
    return float(squared_errors(layer, rows).sum())


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("convolution", [False, True])
def test_no_branch_of_that_rank_comes_closer_to_the_outputs(convolution, rank):
    layer, rows = layer_and_rows(convolution, rank, adapter=6)
    codes = layer.weight_codes().clone()
    left = left_by_quantization(layer, rows)
    fit_branch(layer, rows)
    assert (layer.weight_codes() == codes).float().mean() > 0.99  # but for the rounding of the branch to 16 bits
    best = torch.linalg.lstsq(rows.double(), left.double()).solution
    reachable = rows.double() @ best
    u, s, vh = leading_vectors(reachable, rank)
    least = float((left - u * s @ vh).square().sum())
    assert error_of(layer, rows) == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize("convolution", [False, True])
def test_it_lowers_the_error_most_with_an_adapter_that_keeps_the_weight(convolution):
    before = error_of(*layer_and_rows(convolution, 2))
    errors = {}
    for adapter in (0, 6):
        layer, rows = layer_and_rows(convolution, 2, adapter)
        fit_branch(layer, rows)
        errors[adapter] = error_of(layer, rows)
    assert errors[6] < 0.9 * before and errors[6] < errors[0]


def test_a_sample_of_fewer_positions_than_channels_does_no_harm_to_other_inputs():
    torch.manual_seed(0)
    plain, mix = nn.Linear(128, 32), torch.randn(128, 128) * torch.arange(1, 129) ** -0.5
    few, many = (torch.randn(count, 128) @ mix for count in (24, 2048))
    layer = CalibratingLinear.from_layer(plain, LayerScheme(4, 8, 8), 32)
    initialise({"": layer}, {"": observe({"": plain}, plain, [many], positions=2048)[""]}, Initialisation())
    before = error_of(layer, many)
    fit_branch(layer, few)
    assert error_of(layer, many) < before


def test_initialisation_fits_where_a_recipe_asks_for_it_and_takes_back_what_does_not_help(monkeypatch):
    def error(fit: bool) -> float:
        layer, rows = layer_and_rows(False, 2, adapter=6, fit=fit)
        return error_of(layer, rows)

    assert error(True) < 0.9 * error(False)
    plain, _ = layer_and_rows(False, 2, adapter=6)
    monkeypatch.setattr(initialise_module, "fit_branch", lambda layer, rows: (layer.branch_up.add_(1), layer.adapter_up.add_(1)))
    layer, _ = layer_and_rows(False, 2, adapter=6, fit=True)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, layer.get_parameter(name)), name


def test_training_reaches_every_direction_of_an_adapter_that_was_fitted():
    layer, rows = layer_and_rows(False, 1, adapter=6)
    fit_branch(layer, rows)
    torch.testing.assert_close(layer.adapter_down.norm(dim=1), torch.ones(6))


def test_inputs_that_are_always_zero_do_no_harm():
    layer, rows = layer_and_rows(False, 2, adapter=2)
    fit_branch(layer, torch.zeros_like(rows))
    assert all(torch.isfinite(parameter).all() for parameter in layer.parameters())


def test_a_fit_needs_a_branch_to_fit():
    with pytest.raises(RecipeError, match="branch_fit needs a branch"):
        Layer(branch_fit=True)
    with pytest.raises(RecipeError, match="branch_fit is 'sometimes'"):
        with_values(load_recipe("qartsr"), ["layer.branch_fit=sometimes"])
    with pytest.raises(RecipeError, match="give one of them"):
        with_values(load_recipe("qartsr"), ["layer.branch_rounds=3"])
    assert not with_values(load_recipe("qartsr"), ["layer.branch_fit=false"]).layer.branch_fit
