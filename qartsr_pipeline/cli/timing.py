"""Times checkpoints: their three stages (encode, UNet, decode), the kinds of operators inside them, and several in turns."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from qartsr_pipeline.calibration.data.fingerprint import processor
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.kernels import BACKENDS, list_backends, use_backend
from qartsr_pipeline.kernels.cpu import has_vnni
from qartsr_pipeline.loading import load_quietly
from qartsr_pipeline.one_step import OneStepNetwork
from qartsr_pipeline.quantization.deployed import DeployedLayer

STAGES = ("encode", "unet", "decode")


def clock(device: torch.device) -> float:
    """Seconds, once all work that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()  # as the pipeline; inference_mode is refused by some libraries' tensors
def time_stages(network: OneStepNetwork, up: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Seconds of each stage, and the resulting image.

    Args:
        up: enlarged image (B, 3, H, W) in [-1, 1], on the network's device and in its dtype.
    """
    times = [clock(network.device)]
    x = up
    for stage in (network.encode, network.step, network.decode):
        x = stage(x)
        times.append(clock(network.device))
    return {name: end - start for name, start, end in zip(STAGES, times[:-1], times[1:], strict=True)}, x


# Kinds of operators, and how their names begin; the first that fits counts.
KINDS = {
    "byte products": ("onednn.", "aten._int_mm", "qartsr_cpu.winograd"),
    "branches": ("mkldnn.", "aten.addmm_"),
    "quantize steps": ("qartsr_cpu.", "aten.mul.out", "aten.round", "aten.clamp_", "aten.copy_"),
    "convolutions": ("aten.convolution",),
    "linear layers": ("aten.addmm", "aten.mm"),
    "attention": ("aten._scaled_dot_product", "aten.bmm", "aten._softmax"),
    "normalization": ("aten.native_",),
    "activations": ("aten.silu", "aten.gelu"),
    "sums": ("aten.add", "aten.sum"),
}


def kind_of(operator: str) -> str:
    """The kind that an operator counts as, such as "attention" for "aten.bmm.default"."""
    return next((kind for kind, beginnings in KINDS.items() if operator.startswith(beginnings)), "other")


class OperatorTimes(TorchDispatchMode):
    """While it is entered, the seconds of all operators are added up by kind. On a CPU these are processor seconds of all
    threads; other devices are waited for before and after every operator.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.clock = time.process_time if device.type == "cpu" else partial(clock, device)
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        begun = self.clock()
        result = func(*args, **(kwargs or {}))
        kind, seconds = kind_of(str(func)), self.clock() - begun
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        return result


def tensor_bytes(network: OneStepNetwork) -> int:
    """Bytes of all parameters and buffers of UNet and VAE, and of what kernels keep beside the stored weights."""
    models = (network.unet, network.vae)
    tensors = {id(t): t for model in models for t in (*model.parameters(), *model.buffers())}
    kept = sum(m.prepared.bytes for model in models for m in model.modules() if isinstance(m, DeployedLayer))
    return kept + sum(map(_bytes, tensors.values()))


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes a tensor is stored in; those of its parts if another library's tensor class wraps several into one."""
    if not is_traceable_wrapper_subclass(tensor):
        return tensor.numel() * tensor.element_size()
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


class Contender(NamedTuple):
    """One row of `qartsr bench`: a network, and the backend that computes its layers, or None for the package's own choice."""

    name: str
    backend: str | None
    network: OneStepNetwork


def contenders_of(model: str, against: str | None, device: str, dtype: torch.dtype) -> tuple[list[Contender], dict[str, str]]:
    """Loads what `qartsr bench` compares.

    Args:
        model: timed with the package's choice of kernels, then with every backend that can compute all of its layers.
        against: another checkpoint, which comes first.

    Returns:
        The contenders, and why each other backend cannot compute the model.
    """

    def network_of(name: str) -> OneStepNetwork:
        return load_quietly(fetch(name), dtype=dtype).to(device).network()

    contenders = [Contender(against, None, network_of(against))] if against else []
    network = network_of(model)
    contenders.append(Contender(model, None, network))
    specs = {m.spec for part in (network.unet, network.vae) for m in part.modules() if isinstance(m, DeployedLayer)}
    unable: dict[str, str] = {}
    kind = torch.device(device).type
    for backend, unavailable in list_backends().items() if specs else ():
        reason = unavailable or next(filter(None, (BACKENDS[backend].unsupported(spec, kind) for spec in specs)), None)
        if reason is None:
            contenders.append(Contender(f"{model} on {backend}", backend, network_of(model)))
        else:
            unable[backend] = reason
    return contenders, unable


def time_in_turns(contenders: Sequence[Contender], up: torch.Tensor, rounds: int) -> list[list[dict[str, float]]]:
    """Stage times of every contender in every round. Each runs once before, uncounted, and rounds visit all of them."""
    times: list[list[dict[str, float]]] = [[] for _ in contenders]
    for number in range(rounds + 1):
        for (_, backend, network), counted in zip(contenders, times, strict=True):
            image = up.to(network.device, next(network.vae.parameters()).dtype)
            with use_backend(backend) if backend else nullcontext():
                stages = time_stages(network, image)[0]
            if number:
                counted.append(stages)
    return times


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each stage, and of their sum as "total"."""
    stages = {stage: statistics.median(found[stage] for found in rounds) for stage in rounds[0]}
    return stages | {"total": statistics.median(sum(found.values()) for found in rounds)}


def machine(device: str) -> str:
    """One line: processor or GPU, threads, versions."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else processor()
    threads = ""
    if kind == "cpu":
        bytes_summed = "bytes summed in 32 bits" if list_backends()["onednn"] is None and has_vnni() else "no VNNI"
        vectors = f"{torch.backends.cpu.get_cpu_capability()}, {bytes_summed}"
        threads = f"{vectors}, {torch.get_num_threads()} threads of {os.cpu_count()}, "
    return f"{device}: {name}, {threads}torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.system()}"
