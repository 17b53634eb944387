"""Checks that a checkpoint folder is complete and undamaged, without importing torch. Each fault has its own message.

Files are read as in `integrity`: in bounded time and memory. `structure` goes on where this ends, and compares the tensors that
are stored with those that the configurations ask for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from qartsr_pipeline.arithmetic import FORMAT_VERSION
from qartsr_pipeline.checkpoint_files.integrity import RENEW, CheckpointError, check_checksums, check_readable, read_json
from qartsr_pipeline.checkpoint_files.weight_files import INCOMPLETE, PICKLES, REFUSAL, StoredTensor, stored_tensors

PIPELINE_CLASS = "QArtSRPipeline"
VIDEO_PIPELINE_CLASS = "LSGQuantVideoPipeline"
QUANT_METHOD = "qartsr"


class Component(NamedTuple):
    """What stands in model_index.json for a component, as a pattern for the library and one for the class, and its files.

    Attributes:
        stem: of the names of its weight files; None for a component without weights.
    """

    library: str
    class_name: str
    config: str
    stem: str | None = None
    required: bool = True


_MODEL = ("config.json", "diffusion_pytorch_model")
_SHARED = {
    "scheduler": Component("diffusers", r"\w+Scheduler", "scheduler_config.json"),
    "prompt_embedding": Component(r"component|qartsr_pipeline\.prompt_embedding", "PromptEmbedding", *_MODEL),
}


class Pipeline(NamedTuple):
    """What the folder of one of our pipeline classes holds.

    Attributes:
        module: where the class is defined.
        settings: numbers in model_index.json: name -> smallest value.
    """

    module: str
    components: dict[str, Component]
    settings: dict[str, int]


PIPELINES = {
    PIPELINE_CLASS: Pipeline(
        "qartsr_pipeline.pipeline_qartsr",
        {
            "unet": Component("diffusers", "UNet2DConditionModel", *_MODEL),
            "vae": Component("diffusers", "AutoencoderKL", *_MODEL),
            **_SHARED,
            "text_encoder": Component("transformers", r"\w+", "config.json", "model", required=False),
            "tokenizer": Component("transformers", r"\w+", "tokenizer_config.json", required=False),
        },
        {"timestep": 0, "scale": 1},
    ),
    VIDEO_PIPELINE_CLASS: Pipeline(
        "qartsr_pipeline.pipeline_lsgquant",
        {
            "transformer": Component("diffusers", "WanTransformer3DModel", *_MODEL),
            "vae": Component("diffusers", "AutoencoderKLWan", *_MODEL),
            **_SHARED,
        },
        {"timestep": 1, "scale": 1, "tile_size": 1, "frames_per_chunk": 1},
    ),
}
# every component of any pipeline; those of one name have files of the same names
COMPONENTS = {name: part for pipeline in PIPELINES.values() for name, part in pipeline.components.items()}
_CALLED = {"unet": "the UNet", "transformer": "the transformer"}
_LARGEST_NUMBER = 1_000_000  # of a configuration. No model of this kind has so many channels, tokens or timesteps
_LONGEST_LIST = 10_000  # entries; trained_betas has one for each timestep, overrides at most one for each layer
_MOST_LAYERS = 100  # in one block, or in a text encoder
_MOST_BLOCKS = 16
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
    """Checks that a local checkpoint folder is complete and undamaged, so that the pipeline it names can load it.

    The order is: structure, configuration, weight files, checksums. Full-precision folders pass, too (see `is_quantized`).

    Raises:
        CheckpointError: with one message for each of: not a folder, not a checkpoint, another pipeline's checkpoint, a missing
            or unreadable file, pickled weights, a foreign quantization method, a newer format, a truncated or changed file.
    """
    check_files(folder)
    check_checksums(Path(folder))


def check_files(
    folder: str | os.PathLike, variant: str | None = None, given: Collection[str] = (), wanted: str | None = None
) -> dict[str, dict[str, StoredTensor]]:
    """As `check_checkpoint`, without the sums.

    Args:
        wanted: the pipeline class that the folder must be of; None for any of ours.
        variant: as in diffusers' `from_pretrained`: the infix of the weight files to read, where a component has it.
        given: components and settings that the caller has and that are not read from the folder.

    Returns:
        The stored tensors of every component that is read, from the headers of its weight files.
    """
    folder = Path(folder)
    index = read_model_index(folder, wanted)
    class_name = named_class(index) or ""
    names = [name for name in _components(index, folder, class_name) if name not in given]
    stored = {}
    for name in names:
        _check_component(folder, name, class_name)
        stem = COMPONENTS[name].stem
        if stem is not None:
            stored[name] = stored_tensors(folder, name, stem, variant)
    _check_settings(index, folder, given, class_name)
    for name, config in quantization_configs(folder).items():
        if name in names:
            _check_quantization(config, f"{name}/config.json in {folder}")
    for name in {"unet", "transformer"} & set(names):
        if "timestep" not in given:
            _check_folded_timestep(index, folder, name)
    return stored


def is_quantized(folder: str | os.PathLike) -> bool:
    """Whether any component of the folder carries a quantization_config; False for a full-precision checkpoint."""
    return bool(quantization_configs(folder))


def quantization_configs(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """The `quantization_config` of each component that has one, by component name."""
    configs = {}
    for name, component in COMPONENTS.items():
        path = Path(folder) / name / component.config
        if component.stem and path.is_file() and (config := read_json(path).get("quantization_config")) is not None:
            configs[name] = config
    return configs


def read_model_index(folder: Path, wanted: str | None = None) -> dict[str, Any]:
    """The content of model_index.json.

    Raises:
        CheckpointError: `folder` does not exist, or names another pipeline class than `wanted`, or, for None, than ours.
    """
    if not folder.exists():
        raise CheckpointError(
            f"There is no folder {folder}. Give the path of a checkpoint folder, or a Hub id such as owner/name."
        )
    if not folder.is_dir():
        refusal = f" {REFUSAL}." if folder.suffix in PICKLES else ""
        raise CheckpointError(f"{folder} is a file, but a checkpoint is a folder: the one that holds model_index.json.{refusal}")
    if not os.path.lexists(folder / "model_index.json"):
        raise CheckpointError(_why_not_a_checkpoint(folder))
    index = read_json(folder / "model_index.json")
    found = named_class(index)
    if found not in ([wanted] if wanted else PIPELINES):
        expected = wanted or " or ".join(PIPELINES)
        other = {PIPELINE_CLASS: "an image model", VIDEO_PIPELINE_CLASS: "a video model"}.get(str(found))
        way_out = f"It is {other}: load" if other else "Load"
        raise CheckpointError(
            f"{folder} is a checkpoint of {found or 'an unnamed pipeline'}, not of {expected}, so its parts do not fit."
            f" {way_out} it with the pipeline it names, or give a {'QArtSR' if not other else expected} checkpoint."
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
    try:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    except OSError as error:
        return f"{folder} cannot be read ({error.strerror}). Change its permissions, or give another folder."
    if pickles:
        return f"{message} It holds {pickles[0]}. {REFUSAL}. Ask for a diffusers folder with safetensors."
    if (folder / "config.json").is_file():
        return f"{message} It looks like one component (unet or vae): give the folder above it."
    return f"{message} Give the folder that `save_pretrained` wrote, or a Hub id such as owner/name."


def _components(index: dict[str, Any], folder: Path, class_name: str) -> list[str]:
    """The components that model_index.json lists, after a check of what it says about each."""
    label = f"model_index.json in {folder}"
    components, settings = PIPELINES[class_name].components, PIPELINES[class_name].settings
    named = []
    for name, entry in index.items():
        if name.startswith("_") or name in settings:
            continue
        component = components.get(name)
        if component is None:
            raise CheckpointError(
                f"{label} lists {name[:80]!r}, which this release of {class_name} does not know, so images would differ."
                f" Upgrade"
                f" with `pip install --upgrade qartsr`, or remove the entry if it was added by hand."
            )
        if entry == [None, None] and not component.required:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
            raise CheckpointError(f"{label} says {str(entry)[:80]} of {name}, not a pair [library, class]: {INCOMPLETE}")
        if not re.fullmatch(component.library, entry[0]) or not re.fullmatch(component.class_name, entry[1]):
            raise CheckpointError(
                f"{label} says that {name} is a {entry[1][:80]} of {entry[0][:80]!r}, which {class_name} cannot use."
                f" Download or"
                f" save the checkpoint again, whole, or pass a component of your own: from_pretrained(.., {name}=..)."
            )
        named.append(name)
    for name, component in components.items():
        if component.required and name not in named:
            raise CheckpointError(f"{label} lists no {name}, which {class_name} needs: {INCOMPLETE}")
    return named


def _check_settings(index: dict[str, Any], folder: Path, given: Collection[str], class_name: str) -> None:
    for name, smallest in PIPELINES[class_name].settings.items():
        if name in given:
            continue
        if name not in index:
            raise CheckpointError(
                f"model_index.json in {folder} lacks {name}, without which images would be wrong: {INCOMPLETE[:-1]}, or add the"
                f" {name} that the model was trained at, or pass it: from_pretrained(.., {name}=..)."
            )
        value = index[name]
        if type(value) is not int or not smallest <= value <= _LARGEST_NUMBER:
            raise CheckpointError(
                f"model_index.json in {folder} has the {name} {str(value)[:80]!r}, not an integer from {smallest}: it was"
                f" edited or"
                f" damaged. {RENEW}"
            )


def _check_folded_timestep(index: dict[str, Any], folder: Path, name: str) -> None:
    config = quantization_configs(folder).get(name, {})
    folding = config.get("folding")
    if isinstance(folding, dict) and folding.get("timestep") != index["timestep"]:
        raise CheckpointError(
            f"model_index.json in {folder} has the timestep {index['timestep']}, but the constants of timestep"
            f" {str(folding.get('timestep'))[:80]} are folded into {_CALLED[name]} (quantization_config in {name}/config.json):"
            f" the two do not"
            f" belong together, and images would be wrong. {RENEW}"
        )


def _check_component(folder: Path, name: str, class_name: str) -> None:
    component, expected = folder / name, PIPELINES[class_name].components[name]
    config = expected.config
    if not component.is_dir():
        raise CheckpointError(f"{folder} lacks the component folder {name}/: {INCOMPLETE}")
    label = f"{name}/{config} in {folder}"
    if not os.path.lexists(component / config):
        raise CheckpointError(f"{folder} lacks {name}/{config}: {INCOMPLETE}")
    for path in component.iterdir():  # a pipe would block whoever opens it
        if not path.is_dir():
            check_readable(path, f"{name}/{path.name} in {folder}")
    content = read_json(component / config, label)
    if name == "tokenizer":
        tables = {path.name for path in component.iterdir()}
        lacking = [] if "tokenizer.json" in tables else sorted({"vocab.json", "merges.txt"} - tables)
        if lacking:  # transformers would make a tokenizer without words
            raise CheckpointError(f"{folder} lacks {name}/{lacking[0]}: {INCOMPLETE}")
        return
    check_numbers(content, label)
    found = content.get("_class_name")
    if name != "text_encoder" and (not isinstance(found, str) or not re.fullmatch(expected.class_name, found)):
        raise CheckpointError(
            f"{label} describes a {str(found)[:80]!r}, which is no {name} of {class_name}: it is of another model, or"
            f" damaged. {RENEW}"
        )


def check_numbers(config: dict[str, Any], label: str) -> None:
    """Raises CheckpointError for numbers with which building the model would take minutes or all memory."""
    for key, value in config.items():
        most = _MOST_LAYERS if "layers" in key else _LARGEST_NUMBER
        length = _MOST_BLOCKS if "block" in key else _LONGEST_LIST
        if not _is_bounded(value, most, length):
            raise CheckpointError(
                f"{label} has {key[:80]!r} = {str(value)[:80]}, with which no model can be built (a number above {most:,}, or"
                f" more"
                f" than {length:,} entries): it was edited or damaged. {RENEW}"
            )


def _is_bounded(value: Any, most: int, length: int) -> bool:
    if isinstance(value, (list, dict)):
        parts = value.values() if isinstance(value, dict) else value
        return len(value) <= length and all(_is_bounded(part, most, length) for part in parts)
    return not isinstance(value, (int, float)) or abs(value) <= most


def _check_quantization(config: dict[str, Any], label: str) -> None:
    method = config.get("quant_method") if isinstance(config, dict) else None
    if method != QUANT_METHOD:
        reader = _FOREIGN.get(str(method).lower())
        way = (
            f"That format is read by {reader}: load it with that, or take a QArtSR checkpoint."
            if reader
            else "Load it with the library that wrote it."
        )
        said = f"quant_method {method!r}" if isinstance(config, dict) else f"something that is no object ({str(config)[:40]!r})"
        raise CheckpointError(f"{label} is quantized by {said}, which {PIPELINE_CLASS} does not read. {way}")
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{label} has format_version {str(version)[:80]}, not a positive integer: {INCOMPLETE}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{label} has format_version {version}; this release reads up to {FORMAT_VERSION}."
            f" Upgrade with `pip install --upgrade qartsr`, or take a checkpoint saved by an older release."
        )
