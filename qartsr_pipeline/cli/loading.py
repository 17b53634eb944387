"""Loads a pipeline for a command: without diffusers' bar over components, which tells nothing to whoever waits for pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


def load_quietly(name_or_path: str | Path, **kwargs: Any) -> QArtSRPipeline:
    """As `QArtSRPipeline.from_pretrained`."""
    from diffusers.utils import logging

    from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

    logging.disable_progress_bar()
    try:
        return QArtSRPipeline.from_pretrained(name_or_path, **kwargs)
    finally:
        logging.enable_progress_bar()
