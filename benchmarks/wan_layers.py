"""The linear layers of a WAN transformer block at 4 bits per token on a CPU, against float32 and bfloat16.

    python -m benchmarks run wan-layers --output benchmarks/results/wan_layers_NAME.json

One block of the 1.3 B shape, folded and rotated: queries, keys, values and output of self-attention, queries of cross-attention,
and both feed-forward layers, the second of which rotates its input at run time. Quantizing the input is counted. Weights are
random.
"""

from __future__ import annotations

import argparse
from functools import partial
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.result import Result, markdown
from qartsr_pipeline.kernels import choose_backend
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import LARGEST_ROTATION, LayerScheme
from qartsr_pipeline.quantization.token_layers import TokenLinear

WIDTH, HIDDEN = 1536, 8960
LAYERS = {  # name -> inputs, outputs, how many of them a block has
    "attention": (WIDTH, WIDTH, 5),
    "feed-forward 1": (WIDTH, HIDDEN, 1),
    "feed-forward 2": (HIDDEN, WIDTH, 1),
}
TARGETS = {"fp32": 3.0, "bf16": 1.4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=0, help="of the 16-bit branches (default: 0)")
    parser.add_argument("--rounds", type=int, default=5, help="the fastest counts (default: 5)")
    parser.add_argument("--threads", type=int, default=1)


def quantized(layer: nn.Linear, rank: int, rotated: bool) -> DeployedLayer:
    """W4A4 on the token grid, bounds from the extremes."""
    scheme = LayerScheme(4, 4, rank, "token", LARGEST_ROTATION if rotated else 0)
    return freeze_layer(TokenLinear.from_layer(layer, scheme))


@torch.no_grad()
def measure(args: argparse.Namespace) -> Result:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name, (inputs, outputs, count) in LAYERS.items():
        layer, x = nn.Linear(inputs, outputs), torch.randn(args.tokens, inputs)
        deployed = quantized(layer, args.rank, rotated=inputs == HIDDEN)
        half, x_half = (layer.weight.bfloat16(), layer.bias.bfloat16()), x.bfloat16()
        ways = {
            "fp32": partial(F.linear, x, layer.weight, layer.bias),
            "bf16": partial(F.linear, x_half, *half),
            "w4a4": partial(deployed, x),
            "w4a4 of bf16": partial(deployed, x_half),
        }
        best = dict.fromkeys(ways, float("inf"))
        for _ in range(args.rounds + 1):  # in turns, so that none has the processor for itself; the first round warms up
            for way, run in ways.items():
                start = process_time()
                run()
                best[way] = min(best[way], process_time() - start)
        row = {"layer": name, "count": count, **{way: round(seconds, 5) for way, seconds in best.items()}}
        rows.append(row | {"kernel": choose_backend(deployed.spec, "cpu").name})
    block = {way: sum(row["count"] * row[way] for row in rows) for way in ways}
    summary = {"fp32": round(block["fp32"] / block["w4a4"], 2), "bf16": round(block["bf16"] / block["w4a4 of bf16"], 2)}
    return Result("wan-layers", {"tokens": args.tokens, "rank": args.rank}, rows, {"times faster": summary, "targets": TARGETS})


def table(result: Result) -> str:
    """Processor seconds of each layer, and how many times faster a whole block is."""
    ways = ["fp32", "bf16", "w4a4", "w4a4 of bf16"]
    rows = [[row["layer"], str(row["count"]), *(f"{row[way]:.4f}" for way in ways), row["kernel"]] for row in result.rows]
    faster = result.summary["times faster"]
    block = ", ".join(f"{value:.2f} x {name} (target {result.summary['targets'][name]:g})" for name, value in faster.items())
    return f"{markdown(['layer', 'a block', *ways, 'kernel'], rows)}\n\nA block's layers at W4A4: {block}. Processor seconds."
