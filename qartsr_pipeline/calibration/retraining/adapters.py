"""Low-rank adapters for retraining a model that is too large to train whole: LoRA (arXiv 2106.09685) as OSEDiff uses it.

Every convolution and linear layer of the UNet and of the VAE's encoder gets an adapter of rank 4; first convolutions train whole.
The layers of the time embedding are left out: at one timestep they give a constant. `merge_adapters` adds the adapters to the
weights, which leaves an ordinary model.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel

RANK = 4  # OSEDiff's
LARGE = 200_000_000  # UNet parameters from which adapters are trained instead of all weights
WHOLE = ("conv_in",)  # trained whole
LEFT_OUT = ("time_embedding", "time_emb_proj")  # of the UNet


class LowRank(nn.Module):
    """Adds up @ down, zero at first, to a weight of shape (N, ...): down is (rank, inputs x taps), up (N, rank)."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        flat = weight.flatten(1)
        rank = min(rank, *flat.shape)
        self.down = nn.Parameter(
            torch.randn(rank, flat.shape[1], dtype=weight.dtype, device=weight.device) * flat.shape[1] ** -0.5
        )
        self.up = nn.Parameter(torch.zeros(len(flat), rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view(weight.shape)


def is_large(model: OneStepModel) -> bool:
    """Whether the UNet has more parameters than are trained all at once."""
    return sum(parameter.numel() for parameter in model.unet.parameters()) > LARGE


def add_adapters(model: OneStepModel, rank: int = RANK, seed: int = 0) -> None:
    """Puts an adapter on the layers named at the head of this file, in place; what the model computes stays the same."""
    layers = [*_layers(model.unet, WHOLE + LEFT_OUT), *_layers(model.vae.encoder), *_layers(model.vae.quant_conv)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def _layers(model: nn.Module | None, left_out: tuple[str, ...] = ()) -> Iterable[nn.Conv2d | nn.Linear]:
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not set(left_out) & set(name.split(".")):
            yield module


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to its weight, in place; what the model computes stays the same."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def trained_parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    """What trains of the modules: everything or, where there are adapters, these and the layers `WHOLE`."""
    adapters = [part for module in modules for part in module.modules() if isinstance(part, LowRank)]
    if adapters:
        whole = [layer for module in modules for name, layer in module.named_children() if name in WHOLE]
        modules = [*adapters, *whole]
    return [parameter for module in modules for parameter in module.parameters()]
