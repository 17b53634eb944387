"""Loads a pipeline without diffusers' progress bar over components, and says where it computes by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


def default_device() -> str:
    """ "cuda" or "mps" where there is such a GPU, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def load_quietly(name_or_path: str | Path, **kwargs: Any) -> QArtSRPipeline:
    """As `QArtSRPipeline.from_pretrained`; afterwards the bar is on or off as it was before."""
    shown = logging._tqdm_active  # there is no public way to ask
    logging.disable_progress_bar()
    try:
        return QArtSRPipeline.from_pretrained(name_or_path, **kwargs)
    finally:
        if shown:
            logging.enable_progress_bar()
