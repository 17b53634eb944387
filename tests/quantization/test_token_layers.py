"""The invariant on the token grid: what is simulated is what every backend computes, with the same integers."""

from __future__ import annotations

import itertools

import pytest
import torch
from random_layers import outliers, random_token_linear
from torch import nn

from qartsr_pipeline.arithmetic.token_grid import centred_token_codes, rotated
from qartsr_pipeline.kernels import BACKENDS, use_backend
from qartsr_pipeline.kernels.reference import weight_codes
from qartsr_pipeline.kernels.tokens import quantized_tokens
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import LayerScheme
from qartsr_pipeline.quantization.token_layers import TokenLinear

BITS = [(4, 4), (6, 6), (8, 8), (2, 3), (8, 4), (4, 8), (3, 16), (16, 6)]


def token_scheme(bits: tuple[int, int], rank: int = 0, rotation: int = 0, exponents: bool = False) -> LayerScheme:
    return LayerScheme(*bits, rank, "token", rotation, exponents and bits[1] < 16)


def computing(layer: DeployedLayer) -> list[str]:
    can = {name: backend for name, backend in BACKENDS.items() if name != "triton" and backend.unavailable() is None}
    return [name for name, backend in can.items() if backend.unsupported(layer.spec, "cpu") is None]


def assert_agree(layer: TokenLinear, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    deployed, simulated = freeze_layer(layer), layer(x)
    assert simulated.requires_grad and simulated.dtype == x.dtype
    for backend in computing(deployed):
        with use_backend(backend):
            computed = deployed(x)
        assert computed.dtype == x.dtype and computed.shape == simulated.shape
        assert (computed.float() - simulated.float()).abs().max() <= tolerance * simulated.float().abs().max(), backend
    if layer.layer_scheme.weight_bits < 16:
        assert torch.equal(weight_codes(deployed), layer.weight_codes())
    if layer.layer_scheme.activation_bits < 16:
        exponents = layer.input_exponents if layer.layer_scheme.exponents else None
        values = layer.transform_rows(x.float() * layer.smooth).flatten(0, -2)
        codes, scales = centred_token_codes(values, layer.layer_scheme.activation_bits, exponents)
        found = quantized_tokens(x.flatten(0, -2), deployed)
        assert torch.equal(found.codes.float(), codes) and torch.equal(found.scales, scales[:, 0])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rotation", "exponents"), list(itertools.product((0, 16), (False, True))))
def test_every_backend_computes_what_is_simulated(bits, rotation, exponents):
    for rank, seed in ((0, 0), (5, 1)):
        layer = random_token_linear(token_scheme(bits, rank, rotation, exponents), seed, bias=seed == 0)
        assert_agree(layer, outliers(18, 48, seed).view(2, 9, 48))


@pytest.mark.parametrize("inputs", [1, 7, 96, 320])
def test_other_numbers_of_inputs(inputs):
    layer = random_token_linear(token_scheme((4, 4), 3, 256, True), inputs=inputs, adapter_rank=1)
    assert layer.rotation == {1: 0, 7: 0, 96: 32, 320: 64}[inputs]
    assert_agree(layer, outliers(5, inputs))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_sixteen_bit_inputs_agree_to_their_last_place(dtype, tolerance):
    for rank in (0, 4):
        layer = random_token_linear(token_scheme((4, 4), rank, 16, True))
        assert_agree(layer, torch.randn(20, 48, generator=torch.Generator().manual_seed(1)).to(dtype), tolerance)


def test_it_does_not_matter_which_tokens_come_together():
    deployed = freeze_layer(random_token_linear(token_scheme((4, 4), 0, 16, True), inputs=1536))
    x = outliers(700, 1536)  # more than are worked through at once
    together = quantized_tokens(x, deployed)
    alone = [quantized_tokens(row[None], deployed) for row in x[::100]]
    assert torch.equal(torch.cat([codes.codes for codes in alone]), together.codes[::100])
    assert torch.equal(torch.cat([codes.scales for codes in alone]), together.scales[::100])


def test_without_quantizing_it_is_the_float_layer():
    layer = random_token_linear(token_scheme((4, 4), 3, 16))
    layer.quantizing = False
    x = outliers(4, 48)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_rotation_alone_changes_nothing():
    layer = random_token_linear(token_scheme((16, 16), 0, 16))
    with torch.no_grad():
        for name in ("weight_change", "adapter_up"):
            layer.get_parameter(name).zero_()
    x = outliers(4, 48)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert (layer(x) - expected).norm() < 1e-3 * expected.norm()


def test_channel_exponents_and_rotation_help_where_channels_differ():
    x = outliers(64, 48)
    error = {}
    for rotation, exponents in ((0, False), (0, True), (16, False)):
        layer = random_token_linear(token_scheme((16, 4), 0, rotation, exponents))
        with torch.no_grad():
            layer.log_smooth.zero_()
            layer.set_exponents(x)
            seen = layer.transform_rows(x)
            error[rotation, exponents] = float((layer.quantized_input(x, layer.smooth) - seen).norm() / seen.norm())
    assert max(error[0, True], error[16, False]) < 0.9 * error[0, False], error


def test_draq_as_the_paper_has_it_depends_on_the_tokens_that_come_together():
    layer = random_token_linear(token_scheme((4, 4)))
    layer.online_channels = True
    x = outliers(16, 48)
    assert not torch.allclose(layer(x)[:1], layer(x[:1]), rtol=1e-3)


def test_the_residual_weight_is_trained_through_its_quantizer():
    layer = random_token_linear(token_scheme((4, 4), 3, 16))
    layer(outliers(16, 48)).square().sum().backward()
    for name in ("weight_change", "branch_up", "branch_down", "weight_lower", "log_smooth"):
        assert layer.get_parameter(name).grad.abs().max() > 0, name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_its_token_alone(value):
    deployed = freeze_layer(random_token_linear(token_scheme((4, 4), 0, 16, True)))
    assert not deployed.spec.hides_what_is_not_finite
    x = outliers(6, 48)
    x[2, 7] = value
    for backend in computing(deployed):
        with use_backend(backend):
            y = deployed(x)
        assert not y[2].isfinite().any() and y[[0, 1, 3, 4, 5]].isfinite().all(), backend


def test_tokens_of_zeros():
    deployed = freeze_layer(random_token_linear(token_scheme((4, 4), 0, 16, True)))
    for backend in computing(deployed):
        with use_backend(backend):
            assert torch.equal(deployed(torch.zeros(3, 48)), deployed.bias.expand(3, -1)), backend


def test_gradients_reach_the_input_of_a_deployed_layer():
    deployed = freeze_layer(random_token_linear(token_scheme((8, 8), 0, 16)))
    x = outliers(3, 48).requires_grad_()
    deployed(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_rotations_are_stored_in_the_weight():
    layer = random_token_linear(token_scheme((8, 8), 0, 16))
    layer.set_weight_bounds_to_extremes()
    deployed = freeze_layer(layer)
    weight = weight_codes(deployed) * deployed.weight_scale[:, None]
    expected = layer.merged_weight() / layer.smooth
    assert (rotated(weight, 16) - expected).norm() < 0.02 * expected.norm()
