"""The token grid: one integer product that equals its simulation, rotations that change nothing, and what each costs in error."""

import pytest
import torch

from qartsr_pipeline.arithmetic.affine import BITS
from qartsr_pipeline.arithmetic.token_grid import (
    channel_exponents,
    draq,
    largest_code,
    largest_exponent,
    product,
    rotated,
    rotation_size,
    token_codes,
)


def activations(tokens=96, channels=64):
    """Normal numbers in channels and tokens of very different sizes, as in a transformer."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(channels, generator=generator).exp()
    return torch.randn(tokens, channels, generator=generator) * sizes * torch.linspace(0.5, 2, tokens)[:, None]


def weights(outputs=40, channels=64):
    return torch.randn(outputs, channels, generator=torch.Generator().manual_seed(1)) * 0.1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shifted", [False, True])
def test_the_integer_product_is_the_simulation(bits, shifted):
    x, w = activations(), weights()
    exponents = channel_exponents(x.abs().amax(0), bits) if shifted else None
    codes, quantized = token_codes(x, bits, exponents), token_codes(w, bits)
    assert codes.codes.dtype == torch.int8 and codes.codes.abs().max() <= 127
    simulated = codes.values().double() @ quantized.values().double().T
    found = product(codes, quantized)
    assert (found - simulated).abs().max() <= 1e-6 * simulated.abs().max()


@pytest.mark.parametrize("shifted", [False, True])
def test_by_the_formula(shifted):
    x = activations(5, 8)
    exponents = torch.tensor([0, 1, 2, 3, 4, 0, 0, 1], dtype=torch.int8) if shifted else None
    codes = token_codes(x, 4, exponents)
    for token in range(5):
        powers = [2.0 ** (int(e)) for e in exponents] if shifted else [1.0] * 8
        step = max(abs(float(v)) / p for v, p in zip(x[token], powers, strict=True)) / 7
        for channel in range(8):
            expected = max(-7, min(7, round(float(x[token, channel]) / powers[channel] / step))) * powers[channel]
            assert codes.codes[token, channel] == expected
        assert float(codes.scales[token]) == pytest.approx(step)


def test_exponents_fill_the_byte():
    assert [largest_exponent(bits) for bits in (2, 3, 4, 5, 6, 7, 8)] == [6, 5, 4, 3, 2, 1, 0]
    assert all(largest_code(bits) * 2 ** largest_exponent(bits) <= 127 for bits in range(2, 9))
    found = channel_exponents(torch.tensor([16.0, 8.0, 4.0, 1.0, 0.3, 0.0]), 4)
    assert found.tolist() == [4, 3, 2, 0, 0, 0]
    assert channel_exponents(torch.zeros(3), 4).tolist() == [0, 0, 0]
    for bits in (1, 9):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            largest_code(bits)


def test_channel_scales_help_where_channels_differ():
    x = activations()
    exponents = channel_exponents(x.abs().amax(0), 4)
    error = {
        "token": (token_codes(x, 4).values() - x).norm() / x.norm(),
        "shift": (token_codes(x, 4, exponents).values() - x).norm() / x.norm(),
        "exact": (draq(x, 4) - x).norm() / x.norm(),
    }
    assert max(error["exact"], error["shift"]) < 0.7 * error["token"], error


def test_a_token_does_not_depend_on_the_others():
    x = activations()
    exponents = channel_exponents(x.abs().amax(0), 4)
    alone = token_codes(x[7:8], 4, exponents)
    together = token_codes(x, 4, exponents)
    assert torch.equal(alone.codes[0], together.codes[7]) and alone.scales[0] == together.scales[7]


def test_zeros_stay_zeros():
    x = torch.zeros(3, 8)
    assert torch.equal(token_codes(x, 4).values(), x) and torch.equal(draq(x, 4), x)


def test_nan_is_never_turned_into_a_number():
    x = activations(3)
    x[1, 5] = float("nan")
    found = product(token_codes(x, 4), token_codes(weights(), 4))
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("channels", "size"), [(1536, 256), (8960, 256), (96, 32)])
def test_rotations_change_nothing_but_the_outliers(channels, size):
    assert rotation_size(channels) == size
    x, w = torch.randn(6, channels), torch.randn(4, channels)
    x[:, 0] = 100.0
    turned = rotated(x, size)
    assert torch.allclose(rotated(turned, size), x, atol=1e-4)
    assert torch.allclose(turned @ rotated(w, size).T, x @ w.T, rtol=1e-4, atol=1e-3 * channels**0.5)
    assert turned.abs().max() < 30


def test_odd_channels_have_no_rotation():
    assert rotation_size(7) == rotation_size(1536, 0) == 0 and rotation_size(24, 4) == 4


def test_rotation_is_the_hadamard_matrix():
    h = torch.tensor([[1.0]])
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    assert torch.allclose(rotated(torch.eye(8), 8), h / 8**0.5)
    with pytest.raises(ValueError, match="power of two that divides 24"):
        rotated(torch.zeros(1, 24), 16)
