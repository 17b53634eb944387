"""Checks that a checkpoint folder is complete and undamaged. Each fault has its own message."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qartsr_pipeline.arithmetic import FORMAT_VERSION
from qartsr_pipeline.checkpoint_files.integrity import CheckpointError, check_checksums, check_safetensors

PIPELINE_CLASS = "QArtSRPipeline"
QUANT_METHOD = "qartsr"

# Component -> stem of its weight files. The first three are required, the text encoder is optional.
_REQUIRED = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "prompt_embedding": "diffusion_pytorch_model",
}
_WEIGHTS = {**_REQUIRED, "text_encoder": "model"}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_REFUSAL = "Pickles can run any code when they are opened, so they are refused and never executed"
_FOREIGN = {
    "bitsandbytes": "diffusers with bitsandbytes installed",
    "gguf": "diffusers with gguf installed",
    "modelopt": "diffusers with nvidia-modelopt installed",
    "nunchaku": "nunchaku",
    "quanto": "diffusers with optimum-quanto installed",
    "sdnq": "sdnq",
    "svdquant": "nunchaku",
    "torchao": "diffusers with torchao installed",
}


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Checks that a local checkpoint folder is complete and undamaged, so that QArtSRPipeline can load it.

    The order is: structure, configuration, weight files, checksums. Full-precision folders pass, too (see `is_quantized`).

    Raises:
        CheckpointError: with one message for each of: not a folder, not a checkpoint, another pipeline's checkpoint, a missing
            or unreadable file, pickled weights, a foreign quantization method, a newer format, a truncated or changed file.
    """
    folder = Path(folder)
    index = read_model_index(folder)
    for name in _components(index, folder):
        _check_component(folder, name)
    for name, config in quantization_configs(folder).items():
        _check_quantization(config, f"{name}/config.json in {folder}")
    for path in sorted(folder.rglob("*.safetensors")):
        check_safetensors(path, f"{path.relative_to(folder).as_posix()} in {folder}")
    check_checksums(folder)


def is_quantized(folder: str | os.PathLike) -> bool:
    """Whether any component of the folder carries a quantization_config; False for a full-precision checkpoint."""
    return bool(quantization_configs(folder))


def quantization_configs(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The `quantization_config` of each component that has one, by component name."""
    configs = {}
    for name in _WEIGHTS:
        path = Path(folder) / name / "config.json"
        if path.is_file() and (config := read_json(path).get("quantization_config")):
            configs[name] = config
    return configs


def read_model_index(folder: Path) -> dict[str, Any]:
    """The content of model_index.json; raises CheckpointError unless `folder` exists and names our pipeline's class."""
    if not folder.exists():
        raise CheckpointError(
            f"There is no folder {folder}. Give the path of a checkpoint folder, or a Hub id such as owner/name."
        )
    if not folder.is_dir():
        refusal = f" {_REFUSAL}." if folder.suffix in _PICKLES else ""
        raise CheckpointError(f"{folder} is a file, but a checkpoint is a folder: the one that holds model_index.json.{refusal}")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(_why_not_a_checkpoint(folder))
    index = read_json(folder / "model_index.json")
    found = named_class(index)
    if found != PIPELINE_CLASS:
        raise CheckpointError(
            f"{folder} is a checkpoint of {found or 'an unnamed pipeline'}, not of {PIPELINE_CLASS}, so its parts do not fit."
            f" Load it with the pipeline it names, or give a QArtSR checkpoint."
        )
    return index


def named_class(index: dict[str, Any]) -> str | None:
    """The pipeline class that a model_index.json names; where it also names a module, as [module, class], the class."""
    found = index.get("_class_name")
    if isinstance(found, list) and found:
        found = found[-1]
    return found if isinstance(found, str) else None


def _why_not_a_checkpoint(folder: Path) -> str:
    message = f"{folder} is not a checkpoint folder: it has no model_index.json."
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return f"{message} It holds {pickles[0]}. {_REFUSAL}. Ask for a diffusers folder with safetensors."
    if (folder / "config.json").is_file():
        return f"{message} It looks like one component (unet or vae): give the folder above it."
    return f"{message} Give the folder that `save_pretrained` wrote, or a Hub id such as owner/name."


def _components(index: dict[str, Any], folder: Path) -> list[str]:
    named = [
        name for name, entry in index.items() if isinstance(entry, list) and not name.startswith("_") and entry[:1] != [None]
    ]
    for name in (*_REQUIRED, "scheduler"):
        if name not in named:
            raise CheckpointError(f"model_index.json in {folder} lists no {name}, which {PIPELINE_CLASS} needs: {_incomplete()}")
    return named


def _incomplete() -> str:
    return "the folder is incomplete. Download or save the checkpoint again, whole."


def _check_component(folder: Path, name: str) -> None:
    component = folder / name
    if not component.is_dir():
        raise CheckpointError(f"{folder} lacks the component folder {name}/: {_incomplete()}")
    config = "scheduler_config.json" if name == "scheduler" else "config.json"
    if name in _WEIGHTS or name == "scheduler":
        if not (component / config).is_file():
            raise CheckpointError(f"{folder} lacks {name}/{config}: {_incomplete()}")
        read_json(component / config)
    if name in _WEIGHTS:
        _check_weight_files(folder, name, _WEIGHTS[name])


def _check_weight_files(folder: Path, name: str, stem: str) -> None:
    component = folder / name
    listings = sorted(component.glob(f"{stem}*.safetensors.index*.json"))
    for listing in listings:
        shards = read_json(listing).get("weight_map", {})
        missing = sorted({shard for shard in shards.values() if not (component / shard).is_file()})
        if missing:
            raise CheckpointError(f"{folder} lacks {name}/{missing[0]}, which {listing.name} lists: {_incomplete()}")
    # One file, or parts (.. -00001-of-00002 ..) with the listing that says which tensor is where.
    if listings or any("-of-" not in path.name for path in component.glob(f"{stem}*.safetensors")):
        return
    pickles = sorted(path.name for path in component.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{name}/{pickles[0]} in {folder} is a pickle where {stem}.safetensors belongs. {_REFUSAL}."
            f" Ask for the checkpoint as safetensors, or convert it where you trust its source."
        )
    raise CheckpointError(f"{folder} lacks the weights {name}/{stem}.safetensors: {_incomplete()}")


def _check_quantization(config: dict[str, Any], label: str) -> None:
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method != QUANT_METHOD:
        reader = _FOREIGN.get(str(method).lower())
        way = f"That format is read by {reader}." if reader else "Load it with the library that wrote it."
        raise CheckpointError(f"{label} is quantized by quant_method {method!r}, which {PIPELINE_CLASS} does not read. {way}")
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{label} has format_version {version!r}, not a positive integer: {_incomplete()}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{label} has format_version {version}; this release reads up to {FORMAT_VERSION}."
            f" Upgrade with `pip install --upgrade qartsr`, or take a checkpoint saved by an older release."
        )


def read_json(path: Path, remedy: str = "Download or save the checkpoint again, whole.") -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError, whose message ends with `remedy`, if the file holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object. {remedy}")
    return content
