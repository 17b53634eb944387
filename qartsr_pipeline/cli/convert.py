"""`qartsr convert`: makes checkpoint folders for the other commands from published weights."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from qartsr_pipeline.cli.arguments import add_debug

if TYPE_CHECKING:
    from qartsr_pipeline.convert.conversion import Converted

_BASE_HELP = "diffusers folder, Hub id owner/name, or single .safetensors file of Stable Diffusion 2.1"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser and one below it for each kind of published weights."""
    parser = subparsers.add_parser("convert", description="Makes a checkpoint folder from published weights.")
    sources = parser.add_subparsers(title="sources", metavar="SOURCE", required=True)
    osediff = sources.add_parser("osediff", help="osediff.pkl (OSEDiff) or osediff.ckpt (PassionSR), and its base")
    osediff.add_argument("--base", required=True, metavar="BASE", help=_BASE_HELP)
    osediff.add_argument("--checkpoint", required=True, metavar="FILE", help="osediff.pkl or osediff.ckpt")
    osediff.set_defaults(run=run_osediff)
    diffusers = sources.add_parser("diffusers", help="a one-step model stored as a plain Stable Diffusion pipeline")
    diffusers.add_argument("--base", required=True, metavar="BASE", help=_BASE_HELP)
    diffusers.add_argument("--timestep", type=int, default=999, metavar="T", help="it was trained at; default: 999")
    diffusers.add_argument("--scale", type=int, default=4, metavar="N", help="enlargement it was trained at; default: 4")
    diffusers.set_defaults(run=run_diffusers)
    wan = sources.add_parser("wan", help="a one-step video model on WAN's transformer")
    wan.add_argument(
        "--base", required=True, metavar="BASE", help="diffusers folder, Hub id, or a transformer's .safetensors file"
    )
    wan.add_argument("--vae", metavar="FILE", help="autoencoder as a single file; needed beside a transformer's")
    wan.add_argument("--lora", metavar="FILE", help="adapters of the transformer to merge, .safetensors")
    wan.add_argument("--timestep", type=int, default=399, metavar="T", help="it was trained at; default: 399")
    wan.add_argument("--scale", type=int, default=4, metavar="N", help="enlargement it was trained at; default: 4")
    wan.set_defaults(run=run_wan)
    for source in (osediff, diffusers, wan):
        source.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write, new or empty")
        source.add_argument(
            "--prompt-embedding",
            metavar="FILE",
            help="the fixed prompt's, .safetensors or .pt; default: the empty prompt's",
        )
        add_debug(source)


def run_osediff(options: argparse.Namespace) -> int:
    """`qartsr convert osediff`; returns 0."""
    from qartsr_pipeline.convert.conversion import convert_osediff

    _hide_progress_bars()
    converted = convert_osediff(options.base, options.checkpoint, options.output, options.prompt_embedding, _print_step)
    return _print_result(converted)


def run_diffusers(options: argparse.Namespace) -> int:
    """`qartsr convert diffusers`; returns 0."""
    from qartsr_pipeline.convert.conversion import convert_diffusers

    _hide_progress_bars()
    converted = convert_diffusers(
        options.base, options.output, options.prompt_embedding, options.timestep, options.scale, _print_step
    )
    return _print_result(converted)


def run_wan(options: argparse.Namespace) -> int:
    """`qartsr convert wan`; returns 0."""
    from qartsr_pipeline.convert.wan import convert_wan

    _hide_progress_bars()
    converted = convert_wan(
        options.base,
        options.output,
        options.vae,
        options.lora,
        options.prompt_embedding,
        options.timestep,
        options.scale,
        _print_step,
    )
    return _print_result(converted, "clip.mp4")


def _hide_progress_bars() -> None:
    """Switches off the bars that diffusers and transformers show while they load parts."""
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    if find_spec("transformers"):
        import transformers.utils.logging

        transformers.utils.logging.disable_progress_bar()


def _print_step(step: str) -> None:
    print(f"{step} ..", file=sys.stderr)


def _print_result(converted: Converted, example: str = "photo.png") -> int:
    for component, merged in converted.merged.items():
        replaced = f", {len(merged.replaced)} tensors replaced" if merged.replaced else ""
        print(f"{component}: adapters of {merged.layers} layers merged{replaced}")
    prompts = "takes prompts" if converted.takes_prompts else "stored prompt only, as there is no text encoder and tokenizer"
    print(f"written: {converted.folder} ({converted.size / 1e9:.3f} GB; {prompts})")
    print(f"try it: qartsr upscale {example} --model {converted.folder}")
    return 0
