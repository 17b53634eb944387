"""THE invariant: what calibration simulates is what the deployed layer computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import random_conv, random_linear

from qartsr_pipeline.arithmetic.affine import centred_codes
from qartsr_pipeline.kernels import BACKENDS, use_backend
from qartsr_pipeline.kernels.reference import weight_codes
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import LAYER_BITS, LayerScheme

BIT_PAIRS = list(itertools.product(LAYER_BITS, LAYER_BITS))


def input_codes(layer: CalibratingMixin | DeployedLayer, x: torch.Tensor) -> torch.Tensor:
    """Centred codes of the layer's input, as each of the two states makes them."""
    smooth = layer.smooth.view(-1, *[1] * (x.dim() - 2)) if x.dim() == 4 else layer.smooth
    if isinstance(layer, DeployedLayer):
        return centred_codes(x, smooth / layer.input_scale, layer.input_zero_point.float(), layer.spec.activation_bits)
    return (layer.quantized_input(x, smooth) / layer.input_parameters()[0]).round()


def usable_backends(layer: DeployedLayer) -> list[str]:
    """Those that compute such a layer on this machine's processor."""
    can = {name: backend for name, backend in BACKENDS.items() if name != "triton" and backend.unavailable() is None}
    return [name for name, backend in can.items() if backend.unsupported(layer.spec, "cpu") is None]


def assert_agree(layer: CalibratingMixin, x: torch.Tensor, tolerance: float = 1e-5) -> None:
    deployed, simulated = freeze_layer(layer), layer(x)
    assert simulated.requires_grad and simulated.dtype == x.dtype
    for backend in usable_backends(deployed):
        with use_backend(backend):
            computed = deployed(x)
        assert not computed.requires_grad and computed.dtype == x.dtype and computed.shape == simulated.shape
        assert (computed.float() - simulated.float()).abs().max() <= tolerance * simulated.float().abs().max()
    if layer.layer_scheme.weight_bits < 16:
        assert torch.equal(weight_codes(deployed), layer.weight_codes())
    if layer.layer_scheme.activation_bits < 16:
        codes = input_codes(deployed, x)
        assert torch.equal(codes, input_codes(layer, x))
        assert codes.abs().max() <= 2**layer.layer_scheme.activation_bits - 1


@pytest.mark.parametrize(("weight_bits", "activation_bits"), BIT_PAIRS)
def test_every_pair_of_bits_on_every_backend(weight_bits: int, activation_bits: int):
    for rank in (0, 8):
        scheme = LayerScheme(weight_bits, activation_bits, rank)
        generator = torch.Generator().manual_seed(rank)
        assert_agree(random_linear(scheme), torch.randn(2, 9, 13, generator=generator))
        assert_agree(random_conv(scheme), torch.randn(2, 5, 6, 9, generator=generator))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.data())
def test_every_geometry(data: st.DataObject):
    def pick(*choices):
        return data.draw(st.sampled_from(choices))

    bits, seed = data.draw(st.sampled_from(BIT_PAIRS)), data.draw(st.integers(0, 1000))
    layer = random_conv(
        LayerScheme(*bits, rank=pick(0, 1, 8)),
        seed,
        inputs=pick(1, 3, 4, 9),
        outputs=pick(1, 4, 6),
        kernel=pick(1, 3, 5, (1, 3)),
        stride=pick(1, 2, (2, 1)),
        padding=pick(0, 1, 2, (0, 2)),
        bias=pick(True, False),
        adapter_rank=pick(0, 1, 3),
    )
    height, width = data.draw(st.integers(5, 9)), data.draw(st.integers(5, 12))
    x = torch.randn(pick(1, 3), layer.in_channels, height, width, generator=torch.Generator().manual_seed(seed))
    assert_agree(layer, x)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (16, 6), (3, 16)])
def test_sixteen_bit_inputs_agree_to_their_last_place(bits: tuple[int, int], dtype: torch.dtype, tolerance: float):
    generator = torch.Generator().manual_seed(1)
    for layer, shape in ((random_linear(LayerScheme(*bits, 2)), (3, 13)), (random_conv(LayerScheme(*bits, 2)), (2, 5, 7, 4))):
        assert_agree(layer, torch.randn(shape, generator=generator).to(dtype), tolerance)


def test_weights_of_sixteen_bit_models_agree_too():
    """The float layer may itself be in 16 bit; quantization parameters are float32 all the same."""
    for make, shape in ((random_linear, (3, 13)), (random_conv, (2, 5, 7, 4))):
        layer = make(LayerScheme(4, 4, 2))
        layer.weight.data = layer.weight.data.to(torch.bfloat16)
        layer.bias.data = layer.bias.data.to(torch.bfloat16)
        assert_agree(layer, torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16), 2**-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_padding_is_exactly_zero(bits: int):
    """Whatever the bounds, a border of zeros in the input and the convolution's own padding give the same output."""
    for seed in range(4):
        padded, bare = (random_conv(LayerScheme(bits, bits, 2), seed, padding=p) for p in (1, 0))
        x = torch.randn(1, 5, 6, 6, generator=torch.Generator().manual_seed(seed))
        by_hand = freeze_layer(bare)(torch.nn.functional.pad(x, (1, 1, 1, 1)))
        assert torch.allclose(freeze_layer(padded)(x), by_hand, atol=1e-6)


def test_degenerate_weights_and_bounds():
    """Rows of zeros, bounds that crossed zero or each other: no division by zero, and the two states still agree."""
    layer = random_linear(LayerScheme(3, 3, 0), adapter_rank=0)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.set_weight_bounds_to_extremes()
        layer.weight_lower[1], layer.weight_upper[1] = 0.2, 0.1
        layer.weight_upper[2] = -1.0
        layer.input_lower.fill_(0.5)
    x = torch.randn(4, 13, generator=torch.Generator().manual_seed(3))
    assert_agree(layer, x)
    assert torch.isfinite(layer(x)).all() and torch.allclose(layer(x)[:, 0], layer.bias[0])


@pytest.mark.parametrize("name", ["log_smooth", "weight_lower", "input_upper", "branch_up"])
def test_a_diverged_parameter_is_named(name: str):
    layer = random_linear(LayerScheme(4, 4, 2))
    getattr(layer, name).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match=f"{name} of .* is not finite"):
        freeze_layer(layer)


@pytest.mark.parametrize(("bits", "name"), [(4, "branch_down"), (16, "weight")])
def test_what_float16_cannot_hold_is_named(bits: int, name: str):
    layer = random_linear(LayerScheme(bits, 4, 2 if bits == 4 else 0))
    layer.log_smooth.data.fill_(-20.0)
    with pytest.raises(ValueError, match=f"{name} of .* is not finite.*float16"):
        freeze_layer(layer)


def test_quantos_own_freezing_is_refused():
    with pytest.raises(TypeError, match="freeze.freeze"):
        random_linear(LayerScheme()).freeze()
