"""The command `qartsr`: one entry of `COMMANDS` for each of its commands.

Each command is a module of this folder with a function `add_parser(subparsers)`, which adds the command's parser and has it call
a function `run(options) -> int`, which returns the exit code.

Heavy imports are delayed in one way: `main` imports only the module of the chosen command, and that module imports torch,
diffusers and whatever needs them in the first lines of `run`. So `qartsr --help`, the help of a command and usage errors appear
at once.

Exit codes: 0 done, 2 something could not be done (one line says what, why, and the ways out), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import FrameType
from typing import NamedTuple

from qartsr_pipeline.cli.arguments import list_shipped
from qartsr_pipeline.cli.messages import one_line, say
from qartsr_pipeline.freed_memory import keep_freed_memory


class Command(NamedTuple):
    """One command: the module that has its `add_parser`, and its line in `qartsr --help`."""

    module: str
    help: str


COMMANDS = {
    "upscale": Command("qartsr_pipeline.cli.upscale", "enlarge images and clips"),
    "info": Command("qartsr_pipeline.cli.info", "show what a checkpoint consists of and how each part will run"),
    "bench": Command("qartsr_pipeline.cli.bench", "time a checkpoint on this machine, by stage and kernels"),
    "quantize": Command("qartsr_pipeline.cli.quantize", "make a checkpoint of fewer bits from a full-precision one"),
    "evaluate": Command("qartsr_pipeline.cli.evaluate", "measure models on photographs, against bicubic and full precision"),
    "compare": Command(
        "qartsr_pipeline.cli.compare", "enlarge photographs with several models and write a page to compare them on"
    ),
    "demo": Command("qartsr_pipeline.cli.demo", "enlarge two sample photographs on the CPU and compare"),
    "convert": Command("qartsr_pipeline.cli.convert", "make a checkpoint folder from published weights"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code. Usage errors exit through argparse, with code 2, too.

    Args:
        arguments: None for those of the process.
    """
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if arguments is None and options.keeps_freed_memory:  # the process is this command's own
        keep_freed_memory()
    interrupts: list[int] = []
    try:
        with _noted(interrupts):
            return options.run(options)
    except KeyboardInterrupt:
        print("qartsr: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The program that reads our output, such as `head`, has ended. Python would flush once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        if interrupts:
            say(f"qartsr: interrupted ({one_line(error)})", error=True)
            return 130
        say(f"qartsr: error: {one_line(error)}", error=True)
        return 2


@contextmanager
def _noted(interrupts: list[int]) -> Iterator[None]:
    """Within this context every Ctrl-C is also added to the list: libraries that are being imported make other errors of it."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The parsed arguments, with `run` and `debug` among them; exits with code 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="qartsr", description="One-step diffusion image super-resolution with weights and activations at 4 and 2 bits."
    )
    parser.set_defaults(debug=False, keeps_freed_memory=True)
    list_shipped(parser)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        if name == next(iter(arguments), None):
            import_module(command.module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=command.help)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
