"""Layers on other grids: exact at 16 bits, faithful to their formulas below, and simulation only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qartsr_pipeline.arithmetic.group_grid import quantize_affine_groups, quantize_groups
from qartsr_pipeline.calibration.recipe_layers import Layer, RecipeError
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise
from qartsr_pipeline.calibration.start.observers import SHRINK, observe
from qartsr_pipeline.calibration.start.other_grids import hadamard, layer_kinds
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import LayerScheme

LAYERS = {
    "step": (Layer(), True),
    "offset": (Layer(offset="mean"), False),
    "offset and step": (Layer(offset="centre"), True),
    "groups": (Layer(group_size=4), False),
    "dynamic": (Layer(activations="dynamic"), False),
    "dynamic groups": (Layer(activations="dynamic", group_size=4), False),
    "affine dynamic groups": (Layer(activations="dynamic", group_size=4, group_grid="affine"), False),
    "rotated": (Layer(rotation="hadamard"), False),
    "all of it": (Layer(rotation="hadamard", offset="mean", group_size=4), True),
    "rotated dynamic groups": (Layer(rotation="hadamard", activations="dynamic", group_size=4), False),
}
DEPLOYABLE = {"step"}
KINDS = [pytest.param(*value, id=name) for name, value in LAYERS.items()]
CHANNELS = 11


def original(convolution: bool) -> nn.Module:
    return nn.Conv2d(CHANNELS, 6, (3, 5), 2, (1, 2)) if convolution else nn.Linear(CHANNELS, 6)


def inputs(convolution: bool) -> torch.Tensor:
    shape = (2, CHANNELS, 9, 12) if convolution else (2, 7, CHANNELS)
    return torch.randn(shape) + 0.5


@torch.no_grad()
def calibrating(layer: nn.Module, settings: Layer, step: bool, bits: int, adapter_rank: int = 2, rank: int = 2):
    """With smoothing, branch, adapter and offset away from their starts; bounds hold everything."""
    kind = layer_kinds(settings, step)[isinstance(layer, nn.Conv2d)]
    new = kind.from_layer(layer, LayerScheme(bits, bits, rank), adapter_rank)
    for name, parameter in new.named_parameters(recurse=False):
        if name.startswith(("log_smooth", "branch", "input_offset")):
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    new.set_weight_bounds_to_extremes()
    if bits < 16 and settings.activations == "static":
        new.input_lower.fill_(-8)
        new.input_upper.fill_(8)
    return new


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("settings", "step"), KINDS)
def test_many_bits_give_the_original_layer_borders_included(settings, step, convolution):
    layer, x = original(convolution), inputs(convolution)
    wanted = layer(x).detach()
    weight = layer.weight.detach().clone()
    for bits, most in ((16, 1e-3), (8, 0.15)):
        found = calibrating(layer, settings, step, bits)(x).detach()
        assert (found - wanted).abs().max() < most * wanted.abs().max()
        assert found.dtype == x.dtype
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("settings", "step"), KINDS)
def test_not_quantizing_is_the_original_layer_exactly(settings, step, convolution):
    layer, x = original(convolution), inputs(convolution)
    new = calibrating(layer, settings, step, 2)
    assert not torch.allclose(new(x), layer(x), atol=1e-2)
    new.quantizing = False
    assert torch.equal(new(x), layer(x))


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_only_the_packages_own_grid_freezes(name, convolution):
    settings, step = LAYERS[name]
    new, x = calibrating(original(convolution), settings, step, 4), inputs(convolution)
    if name in DEPLOYABLE:
        with torch.no_grad():
            new.weight_log_step.copy_(0.3 * torch.randn(6))
            new.input_log_step.fill_(-0.4)
        wanted = new(x).detach()
        assert (freeze_layer(new)(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    else:
        with pytest.raises(TypeError, match=f"{type(new).__name__} exists in simulation only"):
            freeze_layer(new)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize(("settings", "step"), KINDS)
def test_every_parameter_gets_a_gradient_and_no_weight_does(settings, step, convolution):
    new = calibrating(original(convolution), settings, step, 3)
    new(inputs(convolution)).square().sum().backward()
    dead = [n for n, p in new.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert new.weight.grad is None
    assert not [name for name in dead if name != "adapter_down"]  # its factor is 0 at the start


def test_nothing_special_is_the_packages_own_layer():
    assert layer_kinds(Layer(smoothing="search", branch_rank=8), False) == (CalibratingLinear, CalibratingConv2d)
    assert layer_kinds(Layer(group_size=4), False) == layer_kinds(Layer(group_size=4), False)
    with pytest.raises(ValueError, match="no bounds"):
        layer_kinds(Layer(activations="dynamic", group_size=4), True)


@pytest.mark.parametrize(("clip", "beyond"), [("before_rounding", 0.0), ("after_rounding", 0.5)])
def test_the_steps_gradient_is_that_of_the_publication(clip, beyond):
    """LSQ, eq. 3: round(v / s) - v / s inside, the extreme code outside; here times s, in the logarithm."""
    kind, _ = layer_kinds(Layer(clip=clip), True)
    layer = nn.Linear(64, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1.5, 1.5, 64)[None])
    new = kind.from_layer(layer, LayerScheme(4, 16))
    with torch.no_grad():
        new.weight_lower.fill_(-1.0)
        new.weight_upper.fill_(0.875)  # step 1/8, zero point 8, codes -8 to 7
    upstream = torch.randn(1, 64)
    (new.qweight * upstream).sum().backward()
    scaled = layer.weight.detach() * 8
    published = torch.where(scaled < -8 - beyond, -8.0, torch.where(scaled > 7 + beyond, 7.0, scaled.round() - scaled))
    torch.testing.assert_close(new.weight_log_step.grad, ((published * upstream).sum() / 8)[None])


@pytest.mark.parametrize(("bits", "codes"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_groups_are_symmetric_and_each_has_its_own_scale(bits, codes):
    x = torch.randn(3, 10, 2, 2) * torch.tensor([1.0] * 4 + [100.0] * 4 + [0.01] * 2).view(-1, 1, 1)
    quantized = quantize_groups(x, 1, 4, bits)
    for first, last in ((0, 4), (4, 8), (8, 10)):
        part = x[:, first:last]
        scale = part.abs().amax(1, keepdim=True) / codes
        torch.testing.assert_close(quantized[:, first:last], (part / scale).round() * scale)


def test_inputs_behind_silu_are_unsigned_and_others_are_not():
    _, kind = layer_kinds(Layer(activations="dynamic", group_size=4), False)
    new = kind.from_layer(original(True), LayerScheme(16, 2))
    x = nn.functional.silu(3 * inputs(True))
    errors = {}
    for lower in (float(x.min()), -1.0):
        new.set_input_range(lower)
        errors[lower] = (new(x) - original_output(new, x)).square().mean()
    unsigned, signed = errors.values()
    assert unsigned < 0.3 * signed
    assert not new.input_unsigned and new.input_offset == 0


def original_output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    layer.quantizing = False
    y = layer(x)
    layer.quantizing = True
    return y


@pytest.mark.parametrize("channels", [1, 3, 8, 24])
def test_the_rotation_is_orthonormal_and_spreads_an_outlier(channels):
    matrix = hadamard(channels)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(channels))
    block = 2 ** (channels.bit_length() - 1)
    assert torch.allclose(matrix[0, :block].abs(), torch.tensor(block**-0.5)) and not matrix[0, block:].any()


def test_rotation_helps_where_one_channel_is_large():
    x = torch.randn(64, 32)
    x[:, 3] *= 10
    layer = nn.Linear(32, 6)
    errors = []
    for settings in (Layer(), Layer(rotation="hadamard")):
        new = layer_kinds(settings, False)[0].from_layer(layer, LayerScheme(16, 4))
        seen = x if settings.rotation == "none" else new.transform_rows(x)
        with torch.no_grad():
            new.input_lower.copy_(seen.min())
            new.input_upper.copy_(seen.max())
            errors.append(float((new(x) - layer(x)).square().mean()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_affine_groups_have_all_codes_and_the_factor_of_least_error(bits):
    torch.manual_seed(0)
    x = torch.randn(6, 10) ** 3
    wide = quantize_affine_groups(x, 1, 4, bits, [1.0])
    best = quantize_affine_groups(x, 1, 4, bits, SHRINK)
    assert best.shape == x.shape and len(best[0, :4].unique()) <= 2**bits
    for start in (0, 4, 8):
        of_wide, of_best = ((q - x)[:, start : start + 4].square().sum(1) for q in (wide, best))
        assert (of_best <= of_wide + 1e-6).all()
    assert bits == 4 or (best - x).square().sum() < 0.95 * (wide - x).square().sum()
    if bits == 2:  # a symmetric grid has three codes there
        assert (best - x).square().sum() < (quantize_groups(x, 1, 4, bits) - x).square().sum()


def test_an_affine_layer_is_closer_than_a_symmetric_one_at_two_bits():
    errors = {}
    for grid in ("symmetric", "affine"):
        torch.manual_seed(0)
        plain = nn.Conv2d(8, 8, 3, padding=1)
        x = torch.nn.functional.silu(torch.randn(4, 8, 16, 16))
        settings = Layer(smoothing="search", group_size=4, activations="dynamic", group_grid=grid)
        layer = layer_kinds(settings, False)[1].from_layer(plain, LayerScheme(2, 2))
        sample = observe({"": plain}, plain, [x])[""]
        errors[grid] = initialise({"": layer}, {"": sample}, Initialisation.of(settings))[""]
        if grid == "affine":
            assert 0.3 <= layer.input_shrink < 1 and layer.input_offset == 0
    assert errors["affine"] < 0.8 * errors["symmetric"]
    with pytest.raises(RecipeError, match="group_grid: affine needs a group_size or dynamic activations"):
        Layer(group_grid="affine")
