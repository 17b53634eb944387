"""Calibrating layers with random weights and every quantization parameter set to something that is not its start."""

from __future__ import annotations

import torch
from torch import nn

from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, CalibratingLinear, CalibratingMixin
from qartsr_pipeline.quantization.scheme import LayerScheme
from qartsr_pipeline.quantization.token_layers import TokenLinear


@torch.no_grad()
def randomize(layer: CalibratingMixin, generator: torch.Generator, spread: float = 0.3) -> None:
    """Moves smoothing, branch, adapter and bounds; the bounds stay in the range of what they bound, so that some values clip."""
    parameters = dict(layer.named_parameters(recurse=False))
    for name, parameter in parameters.items():
        if name == "log_smooth" or name.startswith(("branch", "adapter")):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    layer.set_weight_bounds_to_extremes()
    for name in ("weight_lower", "weight_upper"):
        if name in parameters:
            parameters[name].mul_(0.6 + 0.5 * torch.rand(parameters[name].shape, generator=generator))
    if "input_lower" in parameters:
        layer.input_lower.fill_(-2.5 * torch.rand((), generator=generator).item())
        layer.input_upper.fill_(0.5 + 2.5 * torch.rand((), generator=generator).item())


def random_linear(
    scheme: LayerScheme, seed: int = 0, inputs: int = 13, outputs: int = 11, bias: bool = True, adapter_rank: int = 2
) -> CalibratingLinear:
    return _random(nn.Linear(inputs, outputs, bias), CalibratingLinear, scheme, seed, adapter_rank)


def random_conv(
    scheme: LayerScheme,
    seed: int = 0,
    inputs: int = 5,
    outputs: int = 7,
    kernel: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 1,
    bias: bool = True,
    adapter_rank: int = 2,
) -> CalibratingConv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias)
    return _random(layer, CalibratingConv2d, scheme, seed, adapter_rank)


def _random(layer: nn.Module, kind: type, scheme: LayerScheme, seed: int, adapter_rank: int) -> CalibratingMixin:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / layer.weight[0].numel() ** 0.5)
    calibrating = kind.from_layer(layer, scheme, adapter_rank)
    randomize(calibrating, generator)
    return calibrating


def random_token_linear(
    scheme: LayerScheme, seed: int = 0, inputs: int = 48, outputs: int = 11, bias: bool = True, adapter_rank: int = 2
) -> TokenLinear:
    """All parameters are something else than their start; exponents of all sizes that codes have room for."""
    generator = torch.Generator().manual_seed(seed)
    float_layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        for parameter in float_layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / inputs**0.5)
    layer = TokenLinear.from_layer(float_layer, scheme, adapter_rank)
    layer.train_residual()
    with torch.no_grad():
        layer.weight_change.copy_(0.05 * torch.randn(outputs, inputs, generator=generator))
    randomize(layer, generator)
    layer.set_exponents(outliers(64, inputs, seed))
    return layer


def outliers(tokens: int, channels: int, seed: int = 1) -> torch.Tensor:
    """Tokens and channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(channels, generator=generator).exp()
    return torch.randn(tokens, channels, generator=generator) * sizes * torch.linspace(0.01, 5, tokens)[:, None]
