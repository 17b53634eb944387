"""Gradients of the simulated quantizer, in closed form.

With s = (u - l) / L and value = c s: where x is clipped at the top, value = u, so du = 1; at the bottom dl = 1. Where it is not,
dx = 1 (straight-through) and, through the scale alone, du = (c - x / s) / L, dl = -du (LSQ).
"""

from __future__ import annotations

import pytest
import torch

from qartsr_pipeline.arithmetic.affine import BITS, affine_parameters, centred_codes, fake_quantize, round_straight_through

STEP = 0.25


def bounds_on_the_grid(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds whose zero point needs no rounding, so that the closed form is exact."""
    zero_point = 2 ** (bits - 1) - 1
    lower, upper = -zero_point * STEP, (2**bits - 1 - zero_point) * STEP
    return torch.tensor(lower, requires_grad=True), torch.tensor(upper, requires_grad=True)


def gradients(offset: float, edge: str, bits: int) -> tuple[float, float, float]:
    """Of one value this many steps above the named bound: (dx, dlower, dupper)."""
    lower, upper = bounds_on_the_grid(bits)
    x = ({"lower": lower, "upper": upper}[edge].detach() + offset * STEP).requires_grad_()
    return tuple(g.item() for g in torch.autograd.grad(fake_quantize(x, lower, upper, bits), (x, lower, upper)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0.75, 3.0, 1000.0])
def test_clipped_values_move_their_bound_with_weight_one(bits: int, offset: float):
    assert gradients(offset, "upper", bits) == pytest.approx((0, 0, 1), abs=1e-6)
    assert gradients(-offset, "lower", bits) == pytest.approx((0, 1, 0), abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", [0.0, 0.3, 0.4, 0.7, -0.3, -0.75])
def test_other_values_go_straight_through_and_move_the_scale_by_their_rounding_error(bits: int, offset: float):
    """Also at the extreme codes, which hold half of all values at 2 bits."""
    for edge, sign in (("lower", 1), ("upper", -1)):
        if sign * offset < -0.5:
            continue  # beyond the bound by more than rounding: clipped
        rounding_error = round(offset) - offset
        slope = rounding_error / (2**bits - 1)
        assert gradients(offset, edge, bits) == pytest.approx((1, -slope, slope), abs=1e-4)


def test_symmetric_weights_move_the_larger_bound():
    lower, upper = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    clipped = fake_quantize(torch.tensor([9.0, -9.0]), lower, upper, 8, symmetric=True)
    assert [g.item() for g in torch.autograd.grad(clipped[0], (lower, upper), retain_graph=True)] == pytest.approx([0, 1])
    assert [g.item() for g in torch.autograd.grad(clipped[1], (lower, upper))] == pytest.approx([0, -1])


def test_zero_point_follows_the_bounds_straight_through():
    lower, upper = torch.tensor(-0.9, requires_grad=True), torch.tensor(2.1, requires_grad=True)
    scale, zero_point = affine_parameters(lower, upper, 2)
    assert zero_point.item() == 1
    by_hand = -1 / scale.item() + 0.9 / (3 * scale.item() ** 2)
    assert torch.autograd.grad(zero_point, lower)[0].item() == pytest.approx(by_hand, rel=1e-5)


def test_smoothing_receives_the_gradient_of_a_float_product():
    x, smooth = torch.randn(5, 3), torch.tensor([0.5, 1.0, 2.0], requires_grad=True)
    codes = centred_codes(x, smooth / 0.01, torch.tensor(128.0), 8)
    rounded = torch.round(x * smooth.detach() / 0.01)
    inside = ((rounded >= -128) & (rounded <= 127)).float()
    gradient = torch.autograd.grad((codes * 0.01).sum(), smooth)[0]
    assert torch.allclose(gradient, (x * inside).sum(0), atol=1e-5)


def test_rounding_is_exact_although_it_is_differentiable():
    x = torch.cat([torch.randn(10_000) * scale for scale in (0.1, 1, 100, 1e6)]).requires_grad_()
    rounded = round_straight_through(x)
    assert torch.equal(rounded, torch.round(x))
    assert torch.autograd.grad(rounded.sum(), x)[0].eq(1).all()
