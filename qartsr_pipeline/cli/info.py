"""`qartsr info`: what a checkpoint consists of, how large it is, and which kernel each layer will run on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from qartsr_pipeline.checkpoint_files import check_checkpoint, fetch, is_quantized, label_of
from qartsr_pipeline.cli.arguments import add_debug, add_model_position

if TYPE_CHECKING:
    from qartsr_pipeline.quantization.report import ComponentReport


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("info", description="Shows what a checkpoint consists of and how each part will run.")
    add_model_position(parser)
    parser.add_argument("--layers", action="store_true", help="list every layer")
    parser.add_argument("--json", action="store_true", help="print everything, layers included, as JSON")
    add_debug(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the report as tables or as JSON; returns 0."""
    folder = fetch(options.model)
    check_checkpoint(folder)  # before torch is imported: a folder that cannot be used is reported at once
    from qartsr_pipeline.cli.description import describe, kernels
    from qartsr_pipeline.kernels import list_backends
    from qartsr_pipeline.kernels.compiled import unavailable

    description = describe(folder)
    components = description.components
    if options.json:
        content = {"folder": str(folder), "label": label_of(folder), "quantized": is_quantized(folder)}
        content["accounting"] = description.accounting.to_dict()
        content["components"] = [dataclasses.asdict(component) for component in components]
        print(json.dumps(content, indent=2))
        return 0
    print(folder if is_quantized(folder) else f"{folder} (full precision: nothing in it is quantized)")
    print(f"{folder.name}: {label_of(folder)}\n")
    titles = ["component", "class", "bits", "parameters", "size", "as fp16", "ratio", "prepared", "kernels"]
    print(_table(titles, (_row(component, kernels([component])) for component in components)))
    bits, multiplications = description.accounting.sentences()
    print(f"\nbits a weight: {bits}\nmultiplications: {multiplications}")
    if options.layers:
        for component in components:
            if component.layers:
                print(f"\n{component.name}\n{_layers(component)}")
    if any(component.prepared_bytes for component in components):
        print("\nprepared: what kernels keep in memory beside the size; nothing, and slower, with QARTSR_LOW_MEMORY=1")
    usable = ([name, reason or "yes"] for name, reason in list_backends().items())
    print(f"\n{_table(['backend', 'usable here'], usable)}")
    print(f"\ncompiled loops of onednn and float: {unavailable() or 'yes, by numba'}")
    return 0


def _row(component: ComponentReport, kernels: str) -> list[str]:
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
        kernels,
    ]


def _layers(component: ComponentReport) -> str:
    titles = ["layer", "kind", "bits", "grid", "rank", "shape", "size", "prepared", "kernel"]
    rows = (
        [
            layer.name,
            layer.kind,
            f"W{layer.weight_bits}A{layer.activation_bits}",
            layer.grid,
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


def _table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
