"""What `save_pretrained` adds to a folder that diffusers has written: modules for the generic pipeline class, and the upload.

`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` finds classes of diffusers' own pipelines only. For another
pipeline, model_index.json names a module inside the folder, which the generic class executes; a component of another package
needs one inside the component's folder, or repositories of the Hub are refused. Each of our two modules is one import.
`QArtSRPipeline.from_pretrained` never executes them and needs no trust.

With `push_to_hub=True` diffusers would upload as soon as the weights are written, without these modules and without checksums,
so the upload is done here, last.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

CLASS_NAME = "QArtSRPipeline"
MODULE_NAME = "pipeline"
MODULE_TEXT = f'''"""Lets diffusers find the pipeline's class; needs the package: pip install qartsr."""

from qartsr_pipeline.pipeline_qartsr import {CLASS_NAME}

__all__ = ["{CLASS_NAME}"]
'''

COMPONENT = "prompt_embedding"
COMPONENT_CLASS = ["qartsr_pipeline.prompt_embedding", "PromptEmbedding"]
COMPONENT_MODULE_NAME = "component"
COMPONENT_MODULE_TEXT = f'''"""Lets diffusers find the component's class; needs the package: pip install qartsr."""

from {COMPONENT_CLASS[0]} import {COMPONENT_CLASS[1]}

__all__ = ["{COMPONENT_CLASS[1]}"]
'''
UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")


def write_entry_point(folder: Path) -> None:
    """Writes the modules into a saved pipeline's folder and names them in model_index.json."""
    (folder / f"{MODULE_NAME}.py").write_text(MODULE_TEXT, encoding="utf-8")
    (folder / COMPONENT / f"{COMPONENT_MODULE_NAME}.py").write_text(COMPONENT_MODULE_TEXT, encoding="utf-8")
    named = {"_class_name": [MODULE_NAME, CLASS_NAME], COMPONENT: [COMPONENT_MODULE_NAME, COMPONENT_CLASS[1]]}
    _write(folder / "model_index.json", {**_read(folder / "model_index.json"), **named})


def without_entry_point(config: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's configuration that names classes as if there were no modules, so that no code in the folder is looked for."""
    name = config.get("_class_name")
    plain: dict[str, Any] = {"_class_name": name[-1]} if isinstance(name, (list, tuple)) else {}
    if config.get(COMPONENT) == [COMPONENT_MODULE_NAME, COMPONENT_CLASS[1]]:
        plain[COMPONENT] = COMPONENT_CLASS
    return {**config, **plain}


def forget_origin(folder: Path) -> None:
    """Removes from a saved pipeline's JSON files the path that it was loaded from, which is of no use on another machine."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = _read(path)
        if config.pop("_name_or_path", None) is not None:
            _write(path, config)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def take_upload_arguments(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Removes the arguments of the upload from those of `save_pretrained` and returns them; None if there is no upload."""
    if not kwargs.pop("push_to_hub", False):
        return None
    return {name: kwargs.pop(name) for name in UPLOAD_ARGUMENTS if name in kwargs}


def upload(
    pipeline: DiffusionPipeline,
    folder: Path,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> None:
    """Uploads everything in a saved pipeline's folder, whose README.md, if there is one, is the model card.

    Arguments as in diffusers' `save_pretrained`; without `repo_id` the repository has the folder's name.
    """
    repo_id = huggingface_hub.create_repo(repo_id or folder.resolve().name, exist_ok=True, private=private, token=token).repo_id
    if not (folder / "README.md").exists():
        card = populate_model_card(load_or_create_model_card(repo_id, token=token, is_pipeline=True))
        card.save(folder / "README.md")
    pipeline._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)
