"""Parameters set from a sample, for every thing that a recipe's layer can ask for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qartsr_pipeline.arithmetic.affine import BITS, fake_quantize
from qartsr_pipeline.calibration.recipe_layers import Layer
from qartsr_pipeline.calibration.start import observers
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise, relative_output_error, smoothing_factor
from qartsr_pipeline.calibration.start.observers import InputSample, SquaredErrors, observe
from qartsr_pipeline.calibration.start.other_grids import layer_kinds
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers, prepare
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme

OUTLIER, DEAD = 3, 5


def model_and_input(convolution: bool, dead: bool) -> tuple[nn.Module, torch.Tensor]:
    """Inputs that are off centre, with one large channel, and if wanted a larger one that nobody reads."""
    layer = nn.Conv2d(8, 6, 3, padding=1) if convolution else nn.Linear(8, 6)
    x = torch.randn(4, 8, 16, 16) if convolution else torch.randn(512, 8)
    x = x + 2
    channels = x.movedim(1, 0)
    channels[OUTLIER] *= 8
    if dead:
        channels[DEAD] *= 1000
        with torch.no_grad():
            layer.weight[:, DEAD] = 0
    return nn.Sequential(layer), x


def initialised(
    settings: Layer, bits: tuple[int, int] = (4, 4), step: bool = False, convolution: bool = False, dead: bool = False
) -> tuple[CalibratingMixin, float]:
    """The layer and its error on all inputs, after checking that this is what `initialise` estimates from a sample."""
    torch.manual_seed(0)
    model, x = model_and_input(convolution, dead)
    samples = observe({"0": model[0]}, model, [x])
    wanted = model(x).detach()
    scheme = QuantizationScheme(LayerScheme(*bits, settings.branch_rank))
    prepare(model, scheme, settings.adapter_rank, layer_kinds(settings, step))
    estimated = initialise(calibrating_layers(model), samples, Initialisation.of(settings))["0"]
    layer = model[0]
    assert estimated == pytest.approx(relative_output_error(layer, samples["0"]), rel=1e-4)
    bias = layer.bias.view(1, -1, *[1] * (2 * convolution))
    with torch.no_grad():
        error = float((layer(x) - wanted).square().sum() / (wanted - bias).square().sum())
    if not convolution:  # positions are sampled, not neighbourhoods: of a convolution it is an estimate
        assert relative_output_error(layer, InputSample([x.flatten(0, -2)])) == pytest.approx(error, rel=1e-3)
    layer.requires_grad_(False)
    return layer, error


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("bounds", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"smoothing": "ones"},
        {"smoothing": "search", "branch_rank": 2, "adapter_rank": 2},
        {"smoothing": "search", "offset": "zero"},
        {"offset": "mean"},
        {"smoothing": "search", "offset": "centre", "rotation": "hadamard", "branch_rank": 1},
        {"group_size": 4, "activations": "dynamic"},
    ],
)
def test_eight_bits_are_almost_exact(settings, bounds, convolution):
    settings = Layer(bounds=bounds, percentile=99.9, **settings)
    _, error = initialised(settings, (8, 8), convolution=convolution)
    assert error < (0.02 if bounds == "percentile" else 2e-3)


def test_smoothing_is_left_alone_started_at_one_or_searched():
    phi = {name: initialised(Layer(smoothing=name), dead=True)[0].smooth.detach() for name in ("none", "ones", "search")}
    assert (phi["none"] == 1).all()
    assert phi["ones"][DEAD] < 1e-3 and (phi["ones"][[i for i in range(8) if i != DEAD]] == 1).all()
    assert phi["search"][OUTLIER] < 0.7 * phi["search"][0]


@pytest.mark.parametrize("smoothing", ["none", "ones", "search"])
def test_a_channel_that_nobody_reads_does_not_widen_the_bounds(smoothing):
    layer, _ = initialised(Layer(smoothing=smoothing), dead=True)
    assert layer.input_upper < 100


def test_smoothing_follows_its_formula():
    phi = smoothing_factor(torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 1.0, 1.0]), 0.5)
    torch.testing.assert_close(phi, torch.tensor([0.5, 1.0, 0.25]) / 0.125 ** (1 / 3))  # x^-0.5, geometric mean 1


def test_offsets_are_the_mean_or_the_middle_and_lower_the_error():
    plain = initialised(Layer())[1]
    for offset in ("mean", "centre"):
        layer, error = initialised(Layer(offset=offset))
        assert layer.input_offset[0] == pytest.approx(2, abs=0.5)
        assert layer.input_offset[OUTLIER] == pytest.approx(16, abs=6)
        assert error < 0.9 * plain
    assert not initialised(Layer(offset="zero"))[0].input_offset.any()


def test_a_convolutions_bounds_hold_the_zeros_that_it_pads_with():
    layer, _ = initialised(Layer(offset="mean"), convolution=True)
    assert layer.input_lower <= -layer.input_offset[OUTLIER] * layer.smooth[OUTLIER]


def test_the_branch_bounds_of_least_error_and_rotation_each_lower_the_error():
    plain = initialised(Layer())[1]
    assert initialised(Layer(bounds="mse"))[1] < 0.9 * plain
    assert initialised(Layer(smoothing="search", branch_rank=2))[1] < 0.6 * plain
    assert initialised(Layer(smoothing="search"), (16, 4))[1] < 0.7 * initialised(Layer(), (16, 4))[1]
    assert initialised(Layer(rotation="hadamard"), (16, 4))[1] < 0.9 * initialised(Layer(), (16, 4))[1]


@pytest.mark.parametrize("settings", [{}, {"bounds": "mse"}, {"group_size": 4, "activations": "dynamic"}])
@pytest.mark.parametrize("convolution", [False, True])
def test_a_refined_branch_takes_more_of_the_error_on_every_grid(settings, convolution):
    settings = settings | {"branch_rank": 2, "smoothing": "search"}
    once = initialised(Layer(**settings), (2, 16), convolution=convolution)[1]
    assert initialised(Layer(**settings, branch_rounds=20), (2, 16), convolution=convolution)[1] < 0.95 * once


def test_groups_have_no_bounds_and_inputs_behind_silu_become_unsigned():
    layer, _ = initialised(Layer(activations="dynamic", group_size=4), step=False)
    assert not [n for n, _ in layer.named_parameters() if n.endswith(("lower", "upper"))]
    assert not layer.input_unsigned
    model = nn.Sequential(nn.SiLU(), nn.Linear(8, 6))
    x = torch.randn(64, 8) * 3
    samples = observe({"1": model[1]}, model, [x])
    prepare(model, QuantizationScheme(LayerScheme(16, 4)), kinds=layer_kinds(Layer(activations="dynamic", group_size=4), False))
    initialise(calibrating_layers(model), samples, Initialisation.of(Layer(activations="dynamic", group_size=4)))
    assert model[1].input_unsigned and model[1].input_offset == samples["1"].lower.min() < 0


def test_steps_start_at_one():
    layer, error = initialised(Layer(bounds="mse"), step=True)
    assert not layer.weight_log_step.any() and not layer.input_log_step.any()
    assert error == initialised(Layer(bounds="mse"))[1]


@pytest.mark.parametrize("wrong", [{"bounds": "max"}, {"percentile": 40}, {"offset": "left"}])
def test_values_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Initialisation(**wrong)


@pytest.mark.parametrize("bits", BITS)
def test_squared_errors_are_those_of_the_quantizer(bits):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(300, 7, generator=generator) * torch.linspace(0.1, 3, 7)
    weights = torch.rand(7, generator=generator)
    lower, upper = torch.tensor([-4.0, -0.7, 0.0, -2.0]), torch.tensor([3.0, 1.1, 2.0, 0.0])
    errors = SquaredErrors(values, weights, bits)(lower, upper)
    for error, low, high in zip(errors, lower, upper, strict=True):
        expected = ((fake_quantize(values, low, high, bits) - values).double().square() * weights).sum()
        assert float(error) == pytest.approx(float(expected), rel=1e-5)


def test_bounds_of_rows_are_found_in_parts_just_as_well(monkeypatch):
    torch.manual_seed(0)
    rows, importance = torch.randn(30, 50), torch.rand(1, 50).expand(30, 50)
    whole = observers.row_bounds(rows, importance, 4)
    monkeypatch.setattr(observers, "PART", 170)
    assert all(torch.equal(one, other) for one, other in zip(whole, observers.row_bounds(rows, importance, 4), strict=True))
