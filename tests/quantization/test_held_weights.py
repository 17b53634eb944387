"""Weights held in 16 bits: the same numbers as in float32, gradients too, and a model that still counts as one in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.instances import on_the_same_weights
from qartsr_pipeline.quantization.held_weights import hold_weights, release_weights
from tiny_models import build_tiny_pipeline

LAYERS = {
    "linear": (lambda: nn.Linear(64, 80), (3, 64)),
    "convolution": (lambda: nn.Conv2d(24, 32, 3, stride=2, padding=1), (2, 24, 9, 7)),
    "reflected": (lambda: nn.Conv2d(24, 32, 3, padding=1, padding_mode="reflect"), (2, 24, 9, 7)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_held_layer_computes_in_float32_what_its_rounded_weight_gives(kind, dtype):
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    model = nn.Sequential(nn.Linear(1, 1), build())  # the first parameter is left alone
    rounded = copy.deepcopy(model[1])
    rounded.weight = nn.Parameter(rounded.weight.detach().to(dtype).float())
    assert hold_weights(model, dtype) == 1 and model[1].weight.dtype == dtype
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((model[1], rounded), inputs, strict=True)]
    for y in outputs:
        y.square().sum().backward()
    assert outputs[0].dtype == torch.float32 and torch.equal(*outputs)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    with torch.no_grad():
        assert torch.equal(model[1](inputs[0]), outputs[1])


def test_no_copy_in_float32_waits_for_the_gradient():
    for layer in (nn.Linear(64, 64, bias=False), nn.Conv2d(24, 32, 3)):
        model = nn.Sequential(nn.Linear(1, 1), layer)
        hold_weights(model, torch.bfloat16)
        x = torch.randn(2, 24, 9, 7) if isinstance(layer, nn.Conv2d) else torch.randn(4, 64)
        y = layer(x.requires_grad_())
        layer.weight.data.zero_()  # seen by the gradient, which has nothing else
        y.sum().backward()
        assert not x.grad.any()


def test_models_still_say_float32_and_others_on_the_same_weights_are_not_changed():
    pipeline = build_tiny_pipeline()
    other = on_the_same_weights(pipeline)
    x = torch.rand(1, 3, 16, 16)
    wanted = pipeline(x, output_type="pt", color_fix=None).images
    for model in (other.unet, other.vae):
        assert hold_weights(model, torch.float16) > 0
        assert model.dtype == torch.float32
    assert torch.equal(pipeline(x, output_type="pt", color_fix=None).images, wanted)
    again = on_the_same_weights(other)  # a copy of held layers runs its own weights
    images = [each(x, output_type="pt", color_fix=None).images for each in (other, again)]
    assert torch.equal(*images) and not torch.equal(images[0], wanted)
    assert (images[0] - wanted).abs().max() < 0.01
    for model in (again.unet, again.vae):
        release_weights(model)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert not any("forward" in layer.__dict__ for layer in model.modules())


def test_what_is_held_without_loss_is_the_same_model_to_a_run():
    exact = build_tiny_pipeline()
    for model in (exact.unet, exact.vae):
        model.half().float()
    held, rounded = (on_the_same_weights(exact) for _ in range(2))
    for pipeline, dtype in ((held, torch.float16), (rounded, torch.bfloat16)):
        for model in (pipeline.unet, pipeline.vae):
            hold_weights(model, dtype)
    family = family_of(exact)
    assert family.digest(held) == family.digest(exact) != family.digest(rounded)


def test_float32_changes_nothing_and_what_float16_cannot_hold_is_said():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(64, 64))
    assert hold_weights(model, torch.float32) == 0 and "forward" not in model[1].__dict__
    with torch.no_grad():
        model[1].weight[3, 5] = 7e4
    with pytest.raises(ValueError, match=r"1\.weight has values above 65504, which float16 cannot hold: choose bfloat16"):
        hold_weights(model, torch.float16)
    assert hold_weights(model, torch.bfloat16) == 1
