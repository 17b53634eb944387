"""`qartsr bench`: seconds of a checkpoint on this machine, by stage and backend, as a table for an issue or a README."""

from __future__ import annotations

import argparse

from qartsr_pipeline.cli.arguments import add_debug, add_device_and_dtype, add_model_position, count

ROW = "| {name} | {total:.3f} | {ratio:.2f} | {encode:.3f} | {unet:.3f} | {decode:.3f} | {megabytes:.1f} |"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("bench", description="Times a checkpoint on this machine, by stage and kernels.")
    add_model_position(parser)
    parser.add_argument("--against", metavar="DIR", help="another checkpoint, such as the full-precision one: ratio 1")
    parser.add_argument("--size", type=count, default=128, metavar="N", help="side of the image before enlargement; default: 128")
    parser.add_argument("--rounds", type=count, default=5, metavar="N", help="default: 5")
    add_device_and_dtype(parser)
    add_debug(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the table; returns 0."""
    import torch

    from qartsr_pipeline.cli.device import choose_device, choose_dtype
    from qartsr_pipeline.cli.timing import contenders_of, machine, medians, tensor_bytes, time_in_turns

    device = choose_device(options.device)[0]
    dtype = choose_dtype(options.dtype, device)[0]
    print(f"{machine(device)}, {str(dtype).removeprefix('torch.')}")
    side = 4 * options.size
    print(f"{options.size} x {options.size} to {side} x {side}, median of {options.rounds} rounds, in turns\n")
    contenders, unable = contenders_of(options.model, options.against, device, dtype)
    for backend, reason in unable.items():
        print(f"not on {backend}: {reason}")
    print("| model | seconds | ratio | encode | UNet | decode | weights in memory, MB |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    enlarged = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = [medians(rounds) for rounds in time_in_turns(contenders, enlarged, options.rounds)]
    for contender, row in zip(contenders, rows, strict=True):
        ratio, megabytes = row["total"] / rows[0]["total"], tensor_bytes(contender.network) / 1e6
        print(ROW.format(name=contender.name, ratio=ratio, megabytes=megabytes, **row))
    return 0
