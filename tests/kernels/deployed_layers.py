"""Deployed layers with random contents, made directly."""

from __future__ import annotations

import torch
from torch import nn

from qartsr_pipeline.arithmetic.packing import pack
from qartsr_pipeline.arithmetic.token_grid import largest_exponent
from qartsr_pipeline.quantization.deployed import DeployedLayer, deployed_like
from qartsr_pipeline.quantization.scheme import LayerScheme


def random_layer(float_layer: nn.Module, scheme: LayerScheme, seed: int = 0, exact_scales: bool = False) -> DeployedLayer:
    """A deployed layer of this shape. Inputs of about unit variance reach all of its codes, and some clip.

    Args:
        exact_scales: scales are powers of two, so that products lose nothing when they are scaled.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, low: float = 0.5, high: float = 1.5) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    layer = deployed_like(float_layer, scheme)
    spec, outputs = layer.spec, layer.spec.out_channels
    length = float_layer.weight[0].numel()
    if spec.weight_bits < 8:
        codes = torch.randint(2**spec.weight_bits, (outputs, length), generator=generator)
        layer.weight_packed.copy_(pack(codes, spec.weight_bits))
        layer.weight_zero_point.copy_(torch.randint(2**spec.weight_bits, (outputs,), generator=generator))
    elif spec.weight_bits == 8:
        layer.weight_packed.copy_(
            torch.randint(-127, 128, (outputs, length), generator=generator).to(torch.int8).view(torch.uint8)
        )
    else:
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / length**0.5)
    if spec.weight_bits < 16:
        step = 1 / (2**spec.weight_bits * length**0.5)
        layer.weight_scale.copy_(torch.full((outputs,), 2.0**-8) if exact_scales else step * uniform(outputs))
    if spec.exponents:
        layer.input_exponents.copy_(
            torch.randint(largest_exponent(spec.activation_bits) + 1, (spec.in_channels,), generator=generator)
        )
    if spec.activation_bits < 16 and spec.grid == "tensor":
        step = torch.tensor(2.0**-4) if exact_scales else 4 / 2**spec.activation_bits * uniform(1)[0]
        layer.input_scale.copy_(step)
        layer.input_zero_point.copy_(torch.randint(2**spec.activation_bits, (), generator=generator))
    layer.smooth.copy_(uniform(spec.in_channels))
    if spec.rank:
        layer.branch_down.copy_(torch.randn(layer.branch_down.shape, generator=generator) / spec.in_channels**0.5)
        layer.branch_up.copy_(0.3 * torch.randn(layer.branch_up.shape, generator=generator) / spec.rank**0.5)
    if layer.bias is not None:
        layer.bias.copy_(torch.randn(outputs, generator=generator))
    return layer
