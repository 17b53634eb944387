"""Loads a pipeline without diffusers' progress bar over components, and says where it computes by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers.utils import logging

from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

P = TypeVar("P", bound=CheckpointPipeline)


def default_device() -> str:
    """ "cuda" or "mps" where there is such a GPU, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_quietly(name_or_path: str | Path, **kwargs: Any) -> QArtSRPipeline:
    """As `QArtSRPipeline.from_pretrained`; afterwards the bar is on or off as it was before."""
    return load_kind_quietly(QArtSRPipeline, name_or_path, **kwargs)


def load_kind_quietly(kind: type[P], name_or_path: str | Path, **kwargs: Any) -> P:
    """As `load_quietly`, for a pipeline of another class."""
    shown = logging._tqdm_active  # there is no public way to ask
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(name_or_path, **kwargs)
    finally:
        if shown:
            logging.enable_progress_bar()
