"""Arguments that several commands share, each defined once."""

from __future__ import annotations

import argparse
import re

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT, shipped_labels

DEVICE_HELP = "auto, cuda, cuda:N for the GPU of that number from 0, mps or cpu; default: auto"
_MODEL_HELP = f"checkpoint folder, name of a shipped checkpoint (below), or Hub id owner/name; default: {DEFAULT_CHECKPOINT}"


def add_model_position(parser: argparse.ArgumentParser) -> None:
    """The checkpoint as the command's first argument, which may be left out."""
    parser.add_argument("model", nargs="?", default=DEFAULT_CHECKPOINT, metavar="DIR", help=_MODEL_HELP)
    list_shipped(parser)


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """The checkpoint as `--model`."""
    parser.add_argument("--model", default=DEFAULT_CHECKPOINT, help=_MODEL_HELP)
    list_shipped(parser)


def list_shipped(parser: argparse.ArgumentParser) -> None:
    """Adds what each shipped checkpoint is for to the end of the parser's help."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = [f"  {name:<12}{label}" for name, label in shipped_labels().items()]
    parser.epilog = "\n".join([*([parser.epilog, ""] if parser.epilog else []), "shipped checkpoints:", *lines])


def add_device_and_dtype(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--dtype`, for `device.choose_device` and `device.choose_dtype`."""
    parser.add_argument("--device", type=device_name, default="auto", metavar="DEVICE", help=DEVICE_HELP)
    parser.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto", help="default: auto")


def device_name(text: str) -> str:
    """The type of `--device`. Whether there is such a device is checked when the command runs, by `device.choose_device`."""
    if not re.fullmatch(r"auto|cuda(:\d+)?|mps|cpu", text):
        raise argparse.ArgumentTypeError(f"must be auto, cuda, cuda:N, mps or cpu, but is {text!r}")
    return text


def add_debug(parser: argparse.ArgumentParser) -> None:
    """`--debug`, which `main` reads when an error ends the command."""
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_outputs(parser: argparse.ArgumentParser, metavar: str, what: str) -> None:
    """`--outputs`, which may be given several times, as (name, path) pairs; ``what`` is its help."""
    parser.add_argument("--outputs", nargs="+", action="extend", default=[], type=named_path, metavar=metavar, help=what)


def named_path(text: str) -> tuple[str, str]:
    """NAME=PATH as a pair, for argparse."""
    name, _, path = text.partition("=")
    if not name.strip() or not path:
        raise argparse.ArgumentTypeError(f"must be NAME=FOLDER or NAME=FILE, but is {text!r}")
    return name.strip(), path


def count(text: str) -> int:
    """A whole number above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)
