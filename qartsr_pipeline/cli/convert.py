"""`qartsr convert`: published checkpoints become folders that the other commands take."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qartsr_pipeline.convert.conversion import Converted


def run_osediff(options: argparse.Namespace) -> int:
    """`qartsr convert osediff`; returns 0."""
    _quieten()
    from qartsr_pipeline.convert.conversion import convert_osediff

    return _report(convert_osediff(options.base, options.checkpoint, options.output, options.prompt_embedding, _tell))


def run_diffusers(options: argparse.Namespace) -> int:
    """`qartsr convert diffusers`; returns 0."""
    _quieten()
    from qartsr_pipeline.convert.conversion import convert_diffusers

    return _report(
        convert_diffusers(options.base, options.output, options.prompt_embedding, options.timestep, options.scale, _tell)
    )


def _quieten() -> None:
    """No bars of the libraries that load the parts."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _tell(step: str) -> None:
    print(f"{step} ..", file=sys.stderr)


def _report(converted: Converted) -> int:
    for component, merged in converted.merged.items():
        replaced = f", {len(merged.replaced)} tensors replaced" if merged.replaced else ""
        print(f"{component}: adapters of {merged.layers} layers merged{replaced}")
    prompts = "takes prompts" if converted.takes_prompts else "stored prompt only, as there is no text encoder and tokenizer"
    print(f"written: {converted.folder} ({converted.size / 1e9:.3f} GB; {prompts})")
    print(f"try it: qartsr upscale photo.png --model {converted.folder}")
    return 0
