"""Scales, zero points and codes, against a slow implementation, one number after another, in numpy's float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qartsr_pipeline.arithmetic.affine import BITS, affine_parameters, centred_codes, code_range, fake_quantize

F32 = np.float32
numbers = st.floats(-1e4, 1e4, width=32)


def slow_affine(lower: float, upper: float, bits: int, symmetric: bool) -> tuple[F32, F32, int, int]:
    """Scale, zero point, smallest and largest code."""
    lower, upper = min(F32(lower), F32(0)), max(F32(upper), F32(0))
    if symmetric:
        largest = 2 ** (bits - 1) - 1
        return max(max(-lower, upper) / F32(largest), F32(1e-8)), F32(0), -largest, largest
    largest = 2**bits - 1
    scale = max((upper - lower) / F32(largest), F32(1e-8))
    return scale, min(max(np.rint(-lower / scale), F32(0)), F32(largest)), 0, largest


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=8), numbers, numbers, st.sampled_from(BITS), st.booleans())
def test_codes_equal_the_slow_implementation(values: list[float], lower: float, upper: float, bits: int, symmetric: bool):
    scale, zero_point = affine_parameters(torch.tensor(lower), torch.tensor(upper), bits, symmetric)
    slow_scale, slow_zero, smallest, largest = slow_affine(lower, upper, bits, symmetric)
    assert (scale.item(), zero_point.item()) == (slow_scale, slow_zero)
    slow = [min(max(np.rint(F32(v) * (F32(1) / slow_scale)) + slow_zero, smallest), largest) - slow_zero for v in values]
    x = torch.tensor(values)
    assert centred_codes(x, 1 / scale, zero_point, bits, symmetric).tolist() == slow
    # the path that is differentiated gives the same integers
    differentiable = centred_codes(x.requires_grad_(), 1 / scale, zero_point, bits, symmetric)
    assert differentiable.requires_grad and differentiable.tolist() == slow


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.5, 3.0), (-2.0, -1.0), (-0.278, 5.0), (0.0, 0.0), (3.0, -3.0)])
def test_zero_is_a_code_and_the_grid_spans_the_bounds(bits: int, bounds: tuple[float, float]):
    lower, upper = (torch.tensor(b) for b in bounds)
    scale, zero_point = affine_parameters(lower, upper, bits)
    smallest, largest = code_range(bits)
    assert scale > 0 and zero_point == zero_point.round() and smallest <= zero_point <= largest
    assert fake_quantize(torch.zeros(1), lower, upper, bits).item() == 0
    grid = (torch.arange(smallest, largest + 1) - zero_point) * scale
    assert torch.equal(fake_quantize(grid, lower, upper, bits), grid)  # representable values stay
    if scale > 1e-6:  # an empty range still has a scale, just not its own
        assert (grid[0] - min(bounds[0], 0)).abs() <= 0.5001 * scale and (grid[-1] - max(bounds[1], 0)).abs() <= 0.5001 * scale
        inside = torch.linspace(grid[0], grid[-1], 101)
        assert (fake_quantize(inside, lower, upper, bits) - inside).abs().max() <= 0.5001 * scale


def test_rounds_half_to_even():
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    for x in (halves, halves.clone().requires_grad_()):
        assert centred_codes(x, torch.tensor(1.0), torch.tensor(4.0), 3).tolist() == [-2, -2, 0, 0, 2, 2]


def test_eight_bit_weights_are_symmetric():
    lower, upper = torch.tensor([-1.0, -0.1]), torch.tensor([0.2, 2.0])
    scale, zero_point = affine_parameters(lower, upper, 8, symmetric=True)
    assert zero_point.tolist() == [0, 0] and torch.equal(scale * 127, torch.tensor([1.0, 2.0]))
    codes = centred_codes(torch.tensor([[-9.0, 9.0]] * 2), 1 / scale[:, None], zero_point[:, None], 8, symmetric=True)
    assert codes.tolist() == [[-127, 127]] * 2  # never -128


def test_sixteen_bit_input_is_quantized_in_float32():
    x = torch.linspace(-1, 1, 257).to(torch.bfloat16)
    arguments = torch.tensor(1 / 0.013), torch.tensor(128.0), 8
    assert torch.equal(centred_codes(x, *arguments), centred_codes(x.float(), *arguments))


def test_the_caller_keeps_his_tensor():
    x = torch.linspace(-1, 1, 5)
    before = x.clone()
    centred_codes(x, torch.tensor(1.0), torch.tensor(0.0), 2)
    assert torch.equal(x, before)


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 16])
def test_bits_without_a_quantizer(bits: int):
    with pytest.raises(ValueError, match=f"no {bits}-bit quantizer"):
        code_range(bits)
