"""`save_pretrained(.., push_to_hub=True)`: uploads the folder as it was saved, entry point and checksums included.

diffusers uploads as soon as the weights are written, before what this package adds; so the upload is done here, last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")


def take_upload_arguments(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Removes from the arguments of `save_pretrained` those of the upload and returns them; None when there is to be none."""
    if not kwargs.pop("push_to_hub", False):
        return None
    return {name: kwargs.pop(name) for name in ARGUMENTS if name in kwargs}


def upload(
    pipeline: DiffusionPipeline,
    folder: Path,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> None:
    """Uploads everything in a saved pipeline's folder; arguments as in diffusers. A README.md that is there is the card."""
    repo_id = huggingface_hub.create_repo(repo_id or folder.resolve().name, exist_ok=True, private=private, token=token).repo_id
    if not (folder / "README.md").exists():
        card = populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True))
        card.save(folder / "README.md")
    pipeline._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)
