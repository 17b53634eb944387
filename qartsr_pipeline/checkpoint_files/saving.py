"""Saves a pipeline: whole or not at all, with modules for diffusers' generic pipeline class, checksums, and the upload.

Everything is written to a new folder first. A new checkpoint is renamed into place. Over an earlier one the files are moved one
by one, the checksums first: if the process ends in between, loading says that files were changed, and never mixes two models.

`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` finds classes of diffusers' own pipelines only. For another
pipeline, model_index.json names a module inside the folder, which the generic class executes; a component of another package
needs one inside the component's folder, or repositories of the Hub are refused. Each of our two modules is one import.
`QArtSRPipeline.from_pretrained` never executes them and needs no trust.

With `push_to_hub=True` diffusers would upload as soon as the weights are written, without these modules and without checksums,
so the upload is done here, last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
from diffusers import DiffusionPipeline
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from safetensors import SafetensorError

from qartsr_pipeline.checkpoint_files.checking import COMPONENTS, PIPELINE_CLASS, PIPELINES
from qartsr_pipeline.checkpoint_files.integrity import CHECKSUMS_NAME, RENEW, CheckpointError, write_checksums
from qartsr_pipeline.checkpoint_files.structure import check_structure
from qartsr_pipeline.checkpoint_files.weight_files import INCOMPLETE
from qartsr_pipeline.whole_files import MARK, remove_left_over, temporary_folder

MODULE_NAME = "pipeline"
MODULE_TEXT = '''"""Lets diffusers find the pipeline's class; needs the package: pip install qartsr."""

from {module} import {class_name}

__all__ = ["{class_name}"]
'''

COMPONENT = "prompt_embedding"
COMPONENT_CLASS = ["qartsr_pipeline.prompt_embedding", "PromptEmbedding"]
COMPONENT_MODULE_NAME = "component"
COMPONENT_MODULE_TEXT = f'''"""Lets diffusers find the component's class; needs the package: pip install qartsr."""

from {COMPONENT_CLASS[0]} import {COMPONENT_CLASS[1]}

__all__ = ["{COMPONENT_CLASS[1]}"]
'''
UPLOAD_ARGUMENTS = ("repo_id", "commit_message", "private", "token", "create_pr")


def save_whole(save: Callable[[str], None], folder: Path, variant: str | None = None, class_name: str = PIPELINE_CLASS) -> None:
    """Saves a pipeline into `folder`, which is created, or whose earlier checkpoint is replaced; its other files stay.

    Args:
        save: diffusers' `save_pretrained`, called with the path of a new folder.
        variant: infix of the weight files. None: weights of every earlier save are removed.
        class_name: that the folder names.

    Raises:
        NotADirectoryError: `folder` is a file.
        FileExistsError: `folder` holds weights of another variant, which would no longer belong to the configurations.
        OSError: no space or no permission; what was there before is unchanged.
        CheckpointError: loading would refuse what was written, because the pipeline was changed; what was there is unchanged.
    """
    folder = folder.resolve()  # a link to a folder stays a link
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file, so nothing can be saved in it. Choose another name for the folder.")
    old_weights = _weight_files(folder)
    of_variant = re.compile(rf"\.{re.escape(variant or '')}[.-]")
    others = [file for file in old_weights if variant is not None and not of_variant.search(file.name)]
    if others:
        raise FileExistsError(
            f"{folder} holds {others[0].as_posix()}, which the configurations of variant {variant!r} may not fit, so nothing was"
            f" saved. Save each variant in a folder of its own, or remove the other weights first."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = _place_for_temporary(folder)
        remove_left_over(place)
        temporary = temporary_folder(place / folder.name)
        try:
            save(str(temporary))
            write_entry_point(temporary, class_name)
            forget_origin(temporary)
            write_checksums(temporary)
            _check_written(temporary, folder, variant)
            if place == folder:
                _replace(folder, temporary, old_weights)
            else:
                if folder.is_dir():
                    folder.rmdir()  # not every system renames onto an empty folder
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the second is that of a full disk
        raise OSError(
            f"{folder} could not be written ({error}). What was there is unchanged. Free some space or change the permissions, or"
            f" choose another place."
        ) from error


def _check_written(temporary: Path, folder: Path, variant: str | None) -> None:
    """Raises CheckpointError if loading would refuse what was written: for the pipeline's user, who has no use for its name."""
    try:
        check_structure(temporary, variant)
    except CheckpointError as error:
        reason = str(error).replace(str(temporary), str(folder))
        for download in (RENEW, INCOMPLETE):
            reason = reason.replace(download, "").rstrip(" :,.")
        raise CheckpointError(
            f"The pipeline was not saved, because it could not be loaded again: {reason}. What was in {folder} is unchanged. A"
            " component was changed after it was loaded: take adapters off it (`unload_lora_weights`, `delete_adapters`), undo"
            " changes of its modules and its config, or load the pipeline anew, and save it then."
        ) from error


def _place_for_temporary(folder: Path) -> Path:
    """The parent of a folder that is new or empty, which can be renamed as a whole; else, or if need be, the folder itself."""
    if not folder.is_dir():
        return folder.parent
    empty = all(path.name.startswith(MARK) for path in folder.iterdir())
    return folder.parent if empty and os.access(folder.parent, os.W_OK) and not os.path.ismount(folder) else folder


def _weight_files(folder: Path) -> list[Path]:
    """Weights and listings that loading might read in a folder, whatever their variant, relative to it."""
    found = []
    for name, component in COMPONENTS.items():
        if component.stem is not None:
            pattern = re.compile(rf"{component.stem}[.-].*(safetensors|index.*\.json)")
            found += [path.relative_to(folder) for path in folder.glob(f"{name}/*") if pattern.fullmatch(path.name)]
    return sorted(found)


def _replace(folder: Path, new: Path, old_weights: list[Path]) -> None:
    """Moves the files of `new` into `folder` and removes old weights that were not replaced.

    After an error or an interruption the files that were there are moved back.
    """
    files = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    files.sort(key=lambda file: file.name != CHECKSUMS_NAME)
    earlier = new / "earlier"
    way_back: list[tuple[Path, Path]] = []
    try:
        for file in files:
            (folder / file).parent.mkdir(exist_ok=True)
            if os.path.lexists(folder / file):
                (earlier / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / file, earlier / file)
                way_back.append((earlier / file, folder / file))
            else:
                way_back.append((folder / file, new / file))
            os.replace(new / file, folder / file)
    except BaseException:  # Ctrl-C, too: `new` is about to be removed, and with it what was moved there
        for source, target in reversed(way_back):
            if os.path.lexists(source):
                os.replace(source, target)
        raise
    for file in set(old_weights) - set(files):
        (folder / file).unlink(missing_ok=True)


def write_entry_point(folder: Path, class_name: str = PIPELINE_CLASS) -> None:
    """Writes the modules into a saved pipeline's folder and names them in model_index.json."""
    text = MODULE_TEXT.format(module=PIPELINES[class_name].module, class_name=class_name)
    (folder / f"{MODULE_NAME}.py").write_text(text, encoding="utf-8")
    (folder / COMPONENT / f"{COMPONENT_MODULE_NAME}.py").write_text(COMPONENT_MODULE_TEXT, encoding="utf-8")
    named = {"_class_name": [MODULE_NAME, class_name], COMPONENT: [COMPONENT_MODULE_NAME, COMPONENT_CLASS[1]]}
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
