"""Checkpoints from the Hub: downloaded once into models/qartsr/owner/name, with ComfyUI's progress bar."""

from __future__ import annotations

import shutil
from pathlib import Path

from .model_folders import model_folder


def download_once(hub_id: str) -> Path:
    """The folder of a Hub repository; the network is used only if it is not there yet.

    The folder appears whole: files are collected beside it, and what a cancelled download has fetched is used by the next.

    Args:
        hub_id: owner/name.

    Raises:
        CheckpointError: no such repository, no network, or it holds no checkpoint. InterruptProcessingException: cancelled.
    """
    from qartsr_pipeline.checkpoint_files import CheckpointError, check_checkpoint

    parts = hub_id.split("/")
    if len(parts) != 2 or not all(parts) or any(part.startswith(".") for part in parts) or "\\" in hub_id:
        raise CheckpointError(f"{hub_id!r} is not the name of a Hub repository: expected owner/name.")
    base = model_folder()
    target = base.joinpath(*parts)
    if (target / "model_index.json").is_file():
        return target
    unfinished = base / ".downloads" / "--".join(parts)
    _download(hub_id, unfinished)
    check_checkpoint(unfinished)
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # huggingface_hub's notes on a download that is done
    target.parent.mkdir(exist_ok=True)
    unfinished.rename(target)
    return target


def _download(hub_id: str, folder: Path) -> None:
    from qartsr_pipeline.checkpoint_files.download import PATTERNS, download

    download(
        hub_id,
        allow_patterns=list(PATTERNS),
        local_dir=folder,
        local_files_only=False,
        revision=None,
        tqdm_class=_bar_class(),
    )


def _bar_class() -> type:
    """huggingface_hub's bar, whose bytes are shown in ComfyUI as well. Cancelling raises in the thread that downloads."""
    from comfy.model_management import throw_exception_if_processing_interrupted
    from comfy.utils import ProgressBar
    from huggingface_hub.utils import tqdm

    shown = ProgressBar(1)

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            throw_exception_if_processing_interrupted()
            result = super().update(n)
            if self.unit == "B" and self.total:
                shown.update_absolute(min(self.n, self.total), self.total)
            return result

    return Bar
