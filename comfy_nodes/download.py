"""Downloads checkpoints from the Hub once, into models/qartsr/owner/name, with ComfyUI's progress bar."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .model_folders import FOR_BOTH, find_models, model_folder


def download_once(hub_id: str) -> Path:
    """The folder of a Hub repository; the network is used only if the folder does not exist yet.

    Files are collected in another folder that is renamed at the end, so a folder that exists is complete. Files that a cancelled
    download completed are used by the next one.

    Args:
        hub_id: owner/name.

    Raises:
        CheckpointError: no such repository, no network, or it holds no checkpoint. InterruptProcessingException: cancelled.
    """
    from qartsr_pipeline.checkpoint_files import CheckpointError, check_checkpoint

    parts = hub_id.split("/")
    if len(parts) != 2 or not all(parts) or any(part.startswith(".") for part in parts) or "\\" in hub_id:
        raise CheckpointError(f"{hub_id!r} is not the name of a Hub repository: expected owner/name.")
    there = find_models(FOR_BOTH).get(hub_id)
    if there is not None:
        return there
    base = model_folder()
    target = base.joinpath(*parts)
    unfinished = base / ".downloads" / "--".join(parts)
    _download(hub_id, unfinished)
    check_checkpoint(unfinished)
    shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # huggingface_hub's notes on a download that is done
    target.parent.mkdir(exist_ok=True)
    unfinished.rename(target)
    return target


def _download(hub_id: str, folder: Path) -> None:
    from qartsr_pipeline.checkpoint_files import CheckpointError
    from qartsr_pipeline.checkpoint_files.download import PATTERNS, download

    shown = _Shown()
    try:
        download(
            hub_id,
            allow_patterns=list(PATTERNS),
            local_dir=folder,
            local_files_only=False,
            revision=None,
            tqdm_class=_bar_class(shown),
        )
    except CheckpointError as error:
        if shown.cancelled is None:
            raise
        raise shown.cancelled from error


class _Shown:
    """The node's bar, for all of huggingface_hub's bars and threads together.

    Attributes:
        cancelled: the exception that ComfyUI raised, once; every thread must end with it.
    """

    def __init__(self):
        from comfy.utils import ProgressBar

        self.bar = ProgressBar(1)
        self.bytes = 0
        self.cancelled: Exception | None = None

    def look_for_cancel(self) -> None:
        from comfy.model_management import throw_exception_if_processing_interrupted

        self._do(throw_exception_if_processing_interrupted)

    def show(self, done: float, total: float) -> None:
        """Shows bytes of the files known so far; more files are added while others are downloaded."""
        self.bytes = max(self.bytes, int(done))
        self._do(lambda: self.bar.update_absolute(min(self.bytes, int(total)), int(total)))  # also raises after a cancel

    def _do(self, what: Callable[[], None]) -> None:
        """Runs `what`. ComfyUI reports a cancel once, to the thread that asks first, so it is kept for the others."""
        from comfy.model_management import InterruptProcessingException

        try:
            what()
        except InterruptProcessingException as cancelled:
            self.cancelled = cancelled
        if self.cancelled is not None:
            raise self.cancelled


def _bar_class(shown: _Shown) -> type:
    """huggingface_hub's bar, whose bytes are also shown in ComfyUI. After a cancel it raises in the downloading threads."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, unit: str = "it", initial: float = 0, **options: Any):
            self.done = initial  # tqdm does not count where it shows nothing, as without a terminal
            self.in_bytes = unit == "B"
            super().__init__(*args, unit=unit, initial=initial, **options)

        def update(self, n: float | None = 1) -> bool | None:
            shown.look_for_cancel()
            self.done += n or 0
            if self.in_bytes and self.total:
                shown.show(self.done, self.total)
            return super().update(n)

    return Bar
