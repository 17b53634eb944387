"""Writes a pipeline folder with the record of how it was made and its model card: it appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qartsr_pipeline.checkpoint_files.checking import PIPELINE_CLASS, VIDEO_PIPELINE_CLASS
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.convert.model_card import PIPELINE_TAG, code_text, license_of, markdown_text, yaml_text
from qartsr_pipeline.quantization.accounting import Accounting
from qartsr_pipeline.whole_files import SavingError, remedy, temporary_folder

VIDEO_TAG = "video-to-video"
TRAINING_RECORD = "training.json"  # of a full-precision folder: how the model was trained
CARD_NAME = "README.md"  # written by a person: kept when a folder is replaced


def check_target(folder: Path) -> None:
    """Raises FileExistsError if ``folder`` exists and is not a pipeline folder."""
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileExistsError(f"{folder} exists and is no pipeline folder: it is left alone. Choose another name or remove it.")


def save_pipeline(
    pipeline: CheckpointPipeline, folder: str | Path, record_name: str, record: dict[str, Any], card: str | None = None
) -> dict[str, int]:
    """Saves the pipeline and, as ``record_name``, the record.

    Args:
        folder: an existing pipeline folder is replaced, except for its README.md.
        card: content of README.md where there is none.

    Returns:
        Bytes of each component's files, by the component's name, and their sum as "total".

    Raises:
        FileExistsError: `folder` exists and is not a pipeline folder.
        SavingError: it cannot be written, for instance because the disk is full.
    """
    folder = Path(folder)
    check_target(folder)
    temporary = temporary_folder(folder)
    try:
        pipeline.save_pretrained(temporary)
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (temporary / record_name).write_text(text + "\n", encoding="utf-8")
        if (folder / CARD_NAME).is_file():
            shutil.copy2(folder / CARD_NAME, temporary / CARD_NAME)
        elif card is not None:
            (temporary / CARD_NAME).write_text(card, encoding="utf-8")
        replace_folder(temporary, folder)
    except (SafetensorError, OSError) as error:  # the first is what safetensors makes of a full disk
        raise SavingError(f"{folder} cannot be written ({error}). What was saved before is untouched. {remedy(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder_sizes(folder)


def replace_folder(new: Path, target: Path) -> None:
    """Puts the folder `new` in the place of `target`, which is removed only after that."""
    if not target.exists():
        os.replace(new, target)
        return
    old = target.with_name(f"{new.name}.old")
    os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def folder_sizes(folder: Path) -> dict[str, int]:
    """Bytes on disk of each component of a pipeline folder, and of the whole folder as "total"."""

    def size(path: Path) -> int:
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())

    return {child.name: size(child) for child in sorted(folder.iterdir()) if child.is_dir()} | {"total": size(folder)}


def model_card(record: dict[str, Any], source: Path, hub_id: str | None = None, pipeline_class: str = PIPELINE_CLASS) -> str:
    """The content of a quantized folder's README.md, whose header is read by the Hub. Names that people chose are escaped.

    Args:
        record: the content of `quantization.json`.
        source: the full-precision folder, whose card names the licence.
        hub_id: of the full-precision model, where it came from the Hub.
        pipeline_class: what loads the folder.
    """
    bits, recipe, data = markdown_text(record["bits"].upper()), record["recipe"], record["data"]
    video = pipeline_class == VIDEO_PIPELINE_CLASS
    images = f"{data['count']} photographs" if "count" in data else "procedural images"
    images = f"{data['clips']} clips" if "clips" in data else images
    base = f"base_model: {yaml_text(hub_id)}\n" if hub_id else ""
    trained = f"{recipe['steps']} steps, seed {record['seed']}, " if recipe["stages"] else ""
    costs = ""
    if "accounting" in record:
        stored, computed = Accounting.from_dict(record["accounting"]).sentences()
        network = "transformer" if video else "UNet"
        costs = f"\nBits a weight of the {network}'s and VAE's files: {stored}. Multiplications: {computed}.\n"
    name, made = markdown_text(record["model"]), f"{markdown_text(recipe['method'])} ({markdown_text(recipe['source'])})"
    return f"""---
license: {yaml_text(license_of(source / "README.md") or "other")}
library_name: diffusers
{base}pipeline_tag: {VIDEO_TAG if video else PIPELINE_TAG}
tags: [super-resolution, one-step-diffusion, quantized, qartsr]
---
# {name}, {bits}

{code_text(record["model"])}, quantized to {bits} (bits of weights and activations; each component's `config.json` says which
layers have others), constants of timestep and prompt folded: it takes no other prompt.

```python
from qartsr_pipeline import {pipeline_class}

pipeline = {pipeline_class}.from_pretrained("FOLDER")
{"pipeline(video).frames[0]" if video else "pipeline(image).images[0]"}
```
{costs}
Recipe {made}, {trained}on {images}. `quantization.json` has the whole record: recipe, versions, data,
losses, every layer's error. The licence is that of the full-precision model.
"""
