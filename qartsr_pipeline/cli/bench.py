"""`qartsr bench`: seconds of a checkpoint on the reader's own machine, by stage and backend, ready to be pasted into an issue."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from qartsr_pipeline.one_step import OneStepNetwork

ROW = "| {name} | {total:.3f} | {ratio:.2f} | {encode:.3f} | {unet:.3f} | {decode:.3f} | {megabytes:.1f} |"


class Contender(NamedTuple):
    """One row: a network, and the backend that is demanded for it, or None for the package's own choice."""

    name: str
    backend: str | None
    network: OneStepNetwork


def run(options: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    import torch

    from qartsr_pipeline.cli.device import choose_device, choose_dtype
    from qartsr_pipeline.cli.timing import tensor_bytes

    device = choose_device(options.device)[0]
    dtype = choose_dtype(options.dtype, device)[0]
    print(f"{machine(device)}, {str(dtype).removeprefix('torch.')}")
    side = 4 * options.size
    print(f"{options.size} x {options.size} to {side} x {side}, median of {options.rounds} rounds, in turns\n")
    contenders = list(_contenders(options, device, dtype))
    print("| model | seconds | ratio | encode | UNet | decode | weights in memory, MB |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    up = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    times = in_turns(contenders, up, options.rounds)
    first = None
    for (name, _, network), rounds in zip(contenders, times, strict=True):
        row = summary(rounds)
        first = first or row["total"]
        print(ROW.format(name=name, ratio=row["total"] / first, megabytes=tensor_bytes(network) / 1e6, **row))
    return 0


def machine(device: str) -> str:
    """One line: processor or GPU, threads, versions."""
    import diffusers
    import torch

    from qartsr_pipeline.cli.device import processor
    from qartsr_pipeline.kernels import list_backends
    from qartsr_pipeline.kernels.cpu.onednn import has_vnni

    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    threads = ""
    if device == "cpu":
        bytes_summed = "bytes summed in 32 bits" if list_backends()["onednn"] is None and has_vnni() else "no VNNI"
        vectors = f"{torch.backends.cpu.get_cpu_capability()}, {bytes_summed}"
        threads = f"{vectors}, {torch.get_num_threads()} threads of {os.cpu_count()}, "
    return f"{device}: {name}, {threads}torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.system()}"


def _contenders(options: argparse.Namespace, device: str, dtype: torch.dtype) -> Iterator[Contender]:
    """What is compared with, the model as the package runs it, and the model on every backend that can run all of it."""
    from qartsr_pipeline.checkpoint_files import fetch
    from qartsr_pipeline.cli.loading import load_quietly
    from qartsr_pipeline.kernels import BACKENDS, list_backends
    from qartsr_pipeline.quantization.deployed import DeployedLayer

    def network_of(model: str) -> OneStepNetwork:
        return load_quietly(fetch(model), dtype=dtype).to(device).network()

    if options.against:
        yield Contender(options.against, None, network_of(options.against))
    network = network_of(options.model)
    yield Contender(options.model, None, network)
    specs = {m.spec for model in (network.unet, network.vae) for m in model.modules() if isinstance(m, DeployedLayer)}
    for name, reason in list_backends().items() if specs else ():
        reason = reason or next(filter(None, (BACKENDS[name].unsupported(spec, device) for spec in specs)), None)
        if reason is None:
            yield Contender(f"{options.model} on {name}", name, network_of(options.model))
        else:
            print(f"not on {name}: {reason}")


def in_turns(contenders: list[Contender], up: torch.Tensor, rounds: int) -> list[list[dict[str, float]]]:
    """Stage times of every contender in every round; each is called once before, uncounted."""
    from qartsr_pipeline.cli.timing import time_stages
    from qartsr_pipeline.kernels import use_backend

    times: list[list[dict[str, float]]] = [[] for _ in contenders]
    for turn in range(rounds + 1):
        for index, (_, backend, network) in enumerate(contenders):
            picture = up.to(network.device, next(network.vae.parameters()).dtype)
            with use_backend(backend) if backend else nullcontext():
                found = time_stages(network, picture)[0]
            if turn:
                times[index].append(found)
    return times


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians: of each stage, and of the whole."""
    stages = {stage: statistics.median(found[stage] for found in rounds) for stage in rounds[0]}
    return stages | {"total": statistics.median(sum(found.values()) for found in rounds)}
