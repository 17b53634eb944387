"""`qartsr info`: what a checkpoint consists of, how large it is, and which kernel each layer will run on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from qartsr_pipeline.checkpoint_files import check_checkpoint, fetch, is_quantized

if TYPE_CHECKING:
    from qartsr_pipeline.quantization.report import ComponentReport


def run(options: argparse.Namespace) -> int:
    """Prints the report as tables or as JSON; returns 0."""
    folder = fetch(options.model)
    components = describe(folder)
    if options.json:
        content = [dataclasses.asdict(component) for component in components]
        print(json.dumps({"folder": str(folder), "quantized": is_quantized(folder), "components": content}, indent=2))
        return 0
    print(folder if is_quantized(folder) else f"{folder} (full precision: nothing in it is quantized)")
    titles = ["component", "class", "bits", "parameters", "size", "as fp16", "ratio", "prepared", "kernels"]
    print(_table(titles, map(_row, components)))
    if options.layers:
        for component in components:
            if component.layers:
                print(f"\n{component.name}\n{_layers(component)}")
    if any(component.prepared_bytes for component in components):
        print("\nprepared: what kernels keep in memory beside the size; nothing, and slower, with QARTSR_LOW_MEMORY=1")
    print(f"\n{_backends()}")
    return 0


def describe(folder: Path, device: str | None = None) -> list[ComponentReport]:
    """Loads a checkpoint folder and reports on each of its components that holds weights. Sizes are those of the stored files.

    Args:
        device: the type of device that kernels are chosen for; None for the one that `qartsr upscale` would use.

    Raises:
        CheckpointError: if the folder is not a whole checkpoint.
    """
    check_checkpoint(folder)
    # Imported only now: a folder that cannot be used is reported without waiting for torch.
    import torch

    from qartsr_pipeline.cli.device import choose_device
    from qartsr_pipeline.cli.loading import load_quietly
    from qartsr_pipeline.quantization.report import describe_model

    device = device or choose_device("auto")[0]
    pipeline = load_quietly(folder)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return [_as_stored(describe_model(name, model, device), Path(folder) / name) for name, model in models.items()]


def _as_stored(report: ComponentReport, folder: Path) -> ComponentReport:
    """The report with the bytes, and for full precision the dtypes, that the files of the component have."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    report = dataclasses.replace(report, packed_bytes=sum(file.stat().st_size for file in files))
    if report.quantized:
        return report
    dtypes = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return dataclasses.replace(report, bits=", ".join(sorted(dtypes)).lower())


def kernels(components: list[ComponentReport]) -> str:
    """Which kernels compute how many layers, such as `reference x 123`."""
    counted = Counter(layer.kernel for component in components for layer in component.layers)
    return ", ".join(f"{kernel} x {count}" for kernel, count in counted.most_common()) or "none"


def _backends() -> str:
    """Every backend, in order of preference, and whether this machine can use it."""
    from qartsr_pipeline.kernels import list_backends

    return _table(["backend", "usable here"], ([name, reason or "yes"] for name, reason in list_backends().items()))


def _row(component: ComponentReport) -> list[str]:
    ratio = f"{component.packed_bytes / component.fp16_bytes:.0%}" if component.fp16_bytes else "-"
    return [
        component.name,
        component.class_name,
        component.bits,
        f"{component.parameters:,}",
        _megabytes(component.packed_bytes),
        _megabytes(component.fp16_bytes),
        ratio,
        _megabytes(component.prepared_bytes),
        kernels([component]),
    ]


def _layers(component: ComponentReport) -> str:
    titles = ["layer", "kind", "bits", "rank", "shape", "size", "prepared", "kernel"]
    rows = (
        [
            layer.name,
            layer.kind,
            f"W{layer.weight_bits}A{layer.activation_bits}",
            str(layer.rank),
            " x ".join(map(str, layer.shape)),
            _megabytes(layer.packed_bytes),
            _megabytes(layer.prepared_bytes),
            layer.kernel,
        ]
        for layer in component.layers
    )
    return _table(titles, rows)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3f} MB"


def _table(titles: list[str], rows) -> str:
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
