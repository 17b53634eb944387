"""One program for all benchmarks.

    python -m benchmarks run speed --shape tiny --output benchmarks/results/speed_NAME.json
    python -m benchmarks table benchmarks/results/speed_NAME.json

`run NAME --help` says what a benchmark measures and takes. It prints a table, and writes a JSON file (see `result.Result`) and,
where there is one, a plot beside it. `table` makes both again from the file.

A benchmark is a module of this folder with `add_arguments(parser)`, `measure(args) -> Result`, `table(result) -> str` and
perhaps `plot(result, path)`, which draws into a file.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.result import Result

BENCHMARKS = {  # name -> module of this folder, and its line in the help
    "speed": ("speed", "seconds, memory and error of an enlargement, ours against other libraries"),
    "footprint": ("footprint", "seconds and memory of whole calls, by model and size, and how they grow with the image"),
    "seams": ("seams", "what tiling changes, and whether tile borders can be seen"),
    "full-size": ("full_size", "calibration at the size of Stable Diffusion 2.1"),
    "full-size-folders": ("full_size_folders", "folders at that size: bytes, loading, enlarging"),
    "timesteps": ("timesteps", "what the timestep is worth at low bits"),
    "released-quantizers": ("released_quantizers", "our baselines against the programs that their authors released"),
    "wan-folders": ("wan_folders", "folders at the size of WAN 2.1's 1.3 B model: bytes, converting, loading, enlarging"),
    "wan-layers": ("wan_layers", "linear layers of a WAN transformer block at W4A4 on a CPU"),
    "clips": ("clips", "seconds and memory of clips, as a stream and from file to file"),
    "comfyui": ("comfyui", "the nodes in a real ComfyUI"),
}


def module_of(name: str) -> ModuleType:
    return import_module(f"benchmarks.{BENCHMARKS[name][0]}")


def show(module: ModuleType, result: Result, path: Path) -> None:
    """Prints the table, and draws the plot if the benchmark has one."""
    print(module.table(result))
    if plot := getattr(module, "plot", None):
        plot(result, path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="One program for all benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    names = run.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, (_, about) in BENCHMARKS.items():
        chosen = names.add_parser(name, help=about)
        if argv[:2] == ["run", name]:  # the others need not be imported
            chosen.description = module_of(name).__doc__.split("\n\n")[0]
            module_of(name).add_arguments(chosen)
            chosen.add_argument("--output", type=Path, required=True, help="the JSON file; a plot has its name")
    again = commands.add_parser("table", help="make table and plot of an earlier run again")
    again.add_argument("output", type=Path, metavar="JSON")
    args = parser.parse_args(argv)

    from benchmarks.result import environment, read_result  # imports torch, which --help does not need

    try:
        if args.command == "table":
            result = read_result(args.output)
        else:
            result = module_of(args.name).measure(args)
            result.environment = environment(argv, getattr(args, "device", "cpu"))
            result.write(args.output)
        show(module_of(result.benchmark), result, args.output)
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped; where a benchmark keeps what is finished, the same command continues it\n")
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
