"""The command `qartsr`: upscale | info | bench | convert | demo.

Exit codes: 0 done, 2 something could not be done (one line says what, why, and the ways out), 130 interrupted. Nothing heavy is
imported before a command runs, so that `qartsr --help` and usage errors are quick.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT
from qartsr_pipeline.cli.messages import one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Usage errors exit through argparse, with code 2, too."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("qartsr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output, such as `head`, has seen enough. Python flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"qartsr: error: {one_line(error)}", file=sys.stderr)
        return 2


def _upscale(options: argparse.Namespace) -> int:
    from qartsr_pipeline.cli.upscale import run

    return run(options)


def _info(options: argparse.Namespace) -> int:
    from qartsr_pipeline.cli.info import run

    return run(options)


def _bench(options: argparse.Namespace) -> int:
    from qartsr_pipeline.cli.bench import run

    return run(options)


def _demo(options: argparse.Namespace) -> int:
    from qartsr_pipeline.cli.demo import run

    return run(options.output, model=options.model)


def _convert_osediff(options: argparse.Namespace) -> int:
    from qartsr_pipeline.cli.convert import run_osediff

    return run_osediff(options)


def _convert_diffusers(options: argparse.Namespace) -> int:
    from qartsr_pipeline.cli.convert import run_diffusers

    return run_diffusers(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qartsr", description="One-step diffusion image super-resolution with weights and activations at 4 and 2 bits."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_upscale(commands)
    info = commands.add_parser("info", help="show what a checkpoint consists of and how each part will run")
    info.add_argument("model", nargs="?", default=DEFAULT_CHECKPOINT, metavar="DIR", help=_MODEL_HELP)
    info.add_argument("--layers", action="store_true", help="list every layer")
    info.add_argument("--json", action="store_true", help="print everything, layers included, as JSON")
    info.set_defaults(run=_info)
    bench = _add_bench(commands)
    demo = commands.add_parser("demo", help="upscale the sample photograph on the CPU and compare")
    demo.add_argument("-o", "--output", default="demo_output", metavar="FOLDER", help="default: demo_output")
    demo.add_argument("--model", default=DEFAULT_CHECKPOINT, help=_MODEL_HELP)
    demo.set_defaults(run=_demo)
    sources = _add_convert(commands)
    for command in (commands.choices["upscale"], info, bench, demo, *sources):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


_MODEL_HELP = f"checkpoint folder, name of a shipped checkpoint, or Hub id owner/name; default: {DEFAULT_CHECKPOINT}"


def _add_upscale(commands: argparse._SubParsersAction) -> None:
    upscale = commands.add_parser("upscale", help="enlarge pictures")
    upscale.add_argument("inputs", nargs="+", metavar="IN", help="picture files, and folders of them")
    upscale.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help="file, or folder for several pictures; default: photo_x4.png beside photo.jpg. The suffix chooses the format",
    )
    upscale.add_argument("--model", default=DEFAULT_CHECKPOINT, help=_MODEL_HELP)
    upscale.add_argument("--upscale", type=float, default=4.0, metavar="FACTOR", help="above 0 and up to 16; default: 4")
    upscale.add_argument("--tile-size", type=int, metavar="N", help="pixels of the enlarged picture; default: by free memory")
    upscale.add_argument("--tile-overlap", type=int, metavar="N", help="default: a quarter of the tile, at most 128")
    upscale.add_argument("--color-fix", choices=("wavelet", "adain", "none"), default="wavelet", help="default: wavelet")
    upscale.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: auto")
    upscale.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="default: auto")
    upscale.add_argument(
        "--overwrite", action="store_true", help="replace files that exist; else a folder's that are done are skipped"
    )
    upscale.set_defaults(run=_upscale)


def _add_bench(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    bench = commands.add_parser("bench", help="time a checkpoint on this machine, by stage and kernels")
    bench.add_argument("model", nargs="?", default=DEFAULT_CHECKPOINT, metavar="DIR", help=_MODEL_HELP)
    bench.add_argument("--against", metavar="DIR", help="another checkpoint, such as the full-precision one: ratio 1")
    bench.add_argument("--size", type=int, default=128, metavar="N", help="side of the picture before enlargement; default: 128")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    bench.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: auto")
    bench.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="default: auto")
    bench.set_defaults(run=_bench)
    return bench


def _add_convert(commands: argparse._SubParsersAction) -> list[argparse.ArgumentParser]:
    """Adds `convert` and returns the parsers of its forms."""
    convert = commands.add_parser("convert", help="make a checkpoint folder from published weights")
    sources = convert.add_subparsers(title="sources", metavar="SOURCE", required=True)
    osediff = sources.add_parser("osediff", help="osediff.pkl (OSEDiff) or osediff.ckpt (PassionSR), and its base")
    osediff.add_argument("--base", required=True, metavar="BASE", help=_BASE_HELP)
    osediff.add_argument("--checkpoint", required=True, metavar="FILE", help="osediff.pkl or osediff.ckpt")
    osediff.set_defaults(run=_convert_osediff)
    diffusers = sources.add_parser("diffusers", help="a one-step model stored as a plain Stable Diffusion pipeline")
    diffusers.add_argument("--base", required=True, metavar="BASE", help=_BASE_HELP)
    diffusers.add_argument("--timestep", type=int, default=999, metavar="T", help="it was trained at; default: 999")
    diffusers.add_argument("--scale", type=int, default=4, metavar="N", help="enlargement it was trained at; default: 4")
    diffusers.set_defaults(run=_convert_diffusers)
    for source in (osediff, diffusers):
        source.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write, new or empty")
        source.add_argument(
            "--prompt-embedding",
            metavar="FILE",
            help="the fixed prompt's, .safetensors or .pt; default: the empty prompt's",
        )
    return [osediff, diffusers]


_BASE_HELP = "diffusers folder, Hub id owner/name, or single .safetensors file of Stable Diffusion 2.1"


if __name__ == "__main__":
    sys.exit(main())
