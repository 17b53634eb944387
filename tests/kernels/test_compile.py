"""`torch.compile` of deployed models: whole graphs, the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from deployed_layers import random_layer
from torch import nn

from qartsr_pipeline.quantization.scheme import LayerScheme


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_one_operator_without_a_break(dtype: torch.dtype):
    model = nn.Sequential(
        random_layer(nn.Conv2d(8, 16, 3, 2, 1), LayerScheme(4, 4, 2)),
        nn.SiLU(),
        random_layer(nn.Conv2d(16, 8, 1), LayerScheme(8, 8)),
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for height in (9, 12):
        x = torch.randn(2, 8, height, 11, generator=torch.Generator().manual_seed(height)).to(dtype)
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))


def test_the_operator_passes_torchs_own_checks():
    for float_layer, shape in ((nn.Linear(8, 6), (2, 3, 8)), (nn.Conv2d(8, 6, 3, (2, 1), (1, 0)), (1, 8, 6, 5))):
        layer = random_layer(float_layer, LayerScheme(4, 4, 2))
        x = torch.randn(shape)
        assert layer.spec.output_shape(x.shape) == float_layer(x).shape
        torch.library.opcheck(torch.ops.qartsr.layer, (x, layer.number), test_utils=("test_schema", "test_faketensor"))


def test_copies_are_layers_of_their_own():
    layer = random_layer(nn.Linear(8, 6), LayerScheme(4, 4, 2))
    other = copy.deepcopy(layer)
    other.bias = other.bias + 1
    x = torch.randn(3, 8)
    with torch.no_grad():
        difference = torch.compile(other, backend="aot_eager")(x) - torch.compile(layer, backend="aot_eager")(x)
    assert torch.allclose(difference, torch.ones(()), atol=1e-5)
