"""Seconds of the three stages, encode, UNet and decode, and of the kinds of layers inside them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qartsr_pipeline.one_step import OneStepNetwork
from qartsr_pipeline.quantization.deployed import DeployedLayer

STAGES = ("encode", "unet", "decode")


def clock(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()  # as the pipeline; inference_mode is refused by some libraries' tensors
def time_stages(network: OneStepNetwork, up: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of each stage, and the picture.

    Args:
        up: enlarged picture (B, 3, H, W) in [-1, 1], on the network's device and in its dtype.
    """
    times = [clock(network.device)]
    x = up
    for stage in (network.encode, network.step, network.decode):
        x = stage(x)
        times.append(clock(network.device))
    return {name: end - start for name, start, end in zip(STAGES, times[:-1], times[1:], strict=True)}, x


def kind_of(module: nn.Module) -> str | None:
    """What the module counts as; None for modules that are made of others."""
    if isinstance(module, DeployedLayer):
        kernel = module.spec.kernel_size
        return "linear" if module.spec.kind == "linear" else f"convolution {kernel[0]} x {kernel[1]}"
    if isinstance(module, nn.Conv2d):
        return "convolution {} x {}".format(*module.kernel_size)
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        return "normalization"
    return "activation" if isinstance(module, nn.SiLU) else None


@contextmanager
def kinds_timed(network: OneStepNetwork) -> Iterator[Callable[[], dict[str, float]]]:
    """Within, the function that it gives returns the seconds of all layers so far, by kind. The device is waited for at each."""
    seconds: dict[str, float] = defaultdict(float)
    begun: dict[nn.Module, float] = {}

    def before(module: nn.Module, _: object) -> None:
        begun[module] = clock(network.device)

    def after(module: nn.Module, *_: object) -> None:
        seconds[kind_of(module)] += clock(network.device) - begun[module]

    handles = [
        handle
        for model in (network.unet, network.vae)
        for module in model.modules()
        if kind_of(module)
        for handle in (module.register_forward_pre_hook(before), module.register_forward_hook(after))
    ]
    try:
        yield lambda: dict(seconds)
    finally:
        for handle in handles:
            handle.remove()


def tensor_bytes(network: OneStepNetwork) -> int:
    """Of all parameters and buffers of UNet and VAE, with what kernels keep beside the stored weights."""
    models = (network.unet, network.vae)
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    kept = sum(m.prepared.bytes for model in models for m in model.modules() if isinstance(m, DeployedLayer))
    return kept + sum(map(_bytes, tensors.values()))


def _bytes(tensor: torch.Tensor) -> int:
    """Of what a tensor is stored in, also if it is quantized by a library that wraps several tensors into one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
