"""Finishing touches to saved folders: the generic pipeline class loads them too, and they keep no path of their origin.

diffusers resolves class names of its own pipelines only. For others model_index.json names a module inside the folder, which
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` executes; for a component of another package, it names one in
the component's folder, without which repositories of the Hub are refused. Ours are one import each.
`QArtSRPipeline.from_pretrained` never executes them and needs no trust.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def write_entry_point(folder: Path) -> None:
    """Writes the modules into a saved pipeline's folder and names them in model_index.json."""
    (folder / f"{MODULE_NAME}.py").write_text(MODULE_TEXT, encoding="utf-8")
    (folder / COMPONENT / f"{COMPONENT_MODULE_NAME}.py").write_text(COMPONENT_MODULE_TEXT, encoding="utf-8")
    named = {"_class_name": [MODULE_NAME, CLASS_NAME], COMPONENT: [COMPONENT_MODULE_NAME, COMPONENT_CLASS[1]]}
    _write(folder / "model_index.json", {**_read(folder / "model_index.json"), **named})


def forget_origin(folder: Path) -> None:
    """Removes from a saved pipeline's JSON files where it had been loaded from: a path on somebody's machine."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = _read(path)
        if config.pop("_name_or_path", None) is not None:
            _write(path, config)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def without_entry_point(config: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's configuration in which classes go by their plain names again, so that no code in the folder is looked for."""
    name = config.get("_class_name")
    plain = {"_class_name": name[-1]} if isinstance(name, (list, tuple)) else {}
    if config.get(COMPONENT) == [COMPONENT_MODULE_NAME, COMPONENT_CLASS[1]]:
        plain[COMPONENT] = COMPONENT_CLASS
    return {**config, **plain}
