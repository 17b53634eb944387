"""Compares what a checkpoint folder stores with what its configurations ask for, before anything is loaded.

diffusers fills a tensor that is missing with whatever is in memory, and drops one that has no place; it says so in the log at
most, and images are wrong. Here every component is built without memory (on torch's device "meta"), and its tensors are compared
by name, shape and dtype with the headers of the weight files. So a configuration that fits no weights, however large its numbers
are, is refused by name within a second.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from qartsr_pipeline.checkpoint_files.checking import (
    COMPONENTS,
    PIPELINES,
    VIDEO_PIPELINE_CLASS,
    check_files,
    named_class,
    quantization_configs,
    read_model_index,
)
from qartsr_pipeline.checkpoint_files.integrity import RENEW, CheckpointError, check_checksums, read_json
from qartsr_pipeline.checkpoint_files.weight_files import StoredTensor
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.diffusers_quantizer import QArtSRConfig, QArtSRQuantizer
from qartsr_pipeline.versions import import_transformers

_MODELS: dict[str, type[nn.Module]] = {
    "UNet2DConditionModel": diffusers.UNet2DConditionModel,
    "AutoencoderKL": diffusers.AutoencoderKL,
    "WanTransformer3DModel": diffusers.WanTransformer3DModel,
    "AutoencoderKLWan": diffusers.AutoencoderKLWan,
    "PromptEmbedding": PromptEmbedding,
}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# of quantized layers, which are stored exactly
_DTYPES = {torch.uint8: "U8", torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}
_OTHER_FORMATS = ("use_flashpack", "use_onnx")


def check_loadable(folder: Path, kwargs: dict[str, Any], class_name: str) -> None:
    """Checks a folder, and the arguments with which it is to be loaded, and sets those that keep diffusers from opening pickles.

    Args:
        kwargs: of `from_pretrained`; changed in place.
        class_name: of the pipeline that is to load it.

    Raises:
        CheckpointError: the folder is not complete, damaged, or its parts do not belong together.
        ValueError: an argument asks for another format than safetensors.
    """
    if kwargs.get("use_safetensors") is False:
        raise ValueError(
            "`use_safetensors` must be True: checkpoints are read as safetensors only, because opening a pickle can run code."
            " Leave it out."
        )
    other = [name for name in _OTHER_FORMATS if kwargs.get(name)]
    if other:
        raise ValueError(f"`{other[0]}` must be False: checkpoints are read as safetensors only. Leave it out.")
    variant = kwargs.get("variant")
    if variant is not None and (not isinstance(variant, str) or not variant.replace("-", "_").isidentifier()):
        raise ValueError(
            f"`variant` must be a word such as 'fp16', or None, but is {variant!r}. Leave it out for the usual weights."
        )
    kwargs["use_safetensors"] = True
    pipeline = PIPELINES[class_name]
    given = [name for name in (*pipeline.components, *pipeline.settings) if name in kwargs]
    check_structure(folder, variant, given, class_name)
    check_checksums(folder)


def check_structure(folder: Path, variant: str | None = None, given: Collection[str] = (), wanted: str | None = None) -> None:
    """Checks everything but the sums; arguments as in `checking.check_files`. Raises CheckpointError."""
    for name, tensors in check_files(folder, variant, given, wanted).items():
        _check_model(folder, name, tensors)
    if "scheduler" not in given:
        _check_scheduler(folder)


@contextmanager
def clear_errors(folder: Path, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Names the folder and a way out in errors while a checked folder is loaded, unless the caller's arguments may cause them.

    Raises:
        CheckpointError: for an error of any kind within, if `kwargs` has nothing but `use_safetensors`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CheckpointError) or set(kwargs) - {"use_safetensors"}:
            raise
        raise CheckpointError(f"{folder} cannot be loaded: {_reason(error)}. {RENEW}") from error


def _check_model(folder: Path, name: str, tensors: dict[str, StoredTensor]) -> None:
    config = read_json(folder / name / COMPONENTS[name].config)
    label = f"{name}/{COMPONENTS[name].config} in {folder}"
    class_name = read_model_index(folder)[name][1]
    quantization = quantization_configs(folder).get(name)
    if name == "text_encoder" and quantization is not None:
        return  # what the method stores is known to its own library only
    if name == "text_encoder":
        import_transformers(
            f"{name} in {folder}", "Or load the folder with text_encoder=None, tokenizer=None: its stored prompt is used then."
        )
    try:
        expected = _expected_tensors(name, class_name, json.dumps(config, sort_keys=True), json.dumps(quantization))
    except Exception as error:  # whatever the libraries' constructors raise for the values of a configuration
        raise CheckpointError(
            f"{label} does not describe a {class_name} that can be built: {_reason(error)}. It was edited or damaged. {RENEW}"
        ) from error
    if name == "text_encoder":  # its library renames tensors and leaves some out; only what it would invent is an error
        expected, tensors = _without_prefix(expected), _without_prefix(tensors)
        tensors = {tensor: stored for tensor, stored in tensors.items() if tensor in expected}
    else:
        tensors = _with_present_names(folder / name, tensors, expected)
    weights = f"the weights in {folder / name}"
    why = f"the two do not belong together. {RENEW}"
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{weights} lack {_counted(missing)}, which {name}/config.json asks for: {why}")
    if surplus:
        raise CheckpointError(f"{weights} hold {_counted(surplus)}, for which {name}/config.json leaves no place: {why}")
    for tensor, (dtypes, shape) in expected.items():
        stored = tensors[tensor]
        if stored.shape != shape or stored.dtype not in dtypes:
            wanted = f"{next(iter(dtypes)) if len(dtypes) == 1 else 'a floating-point type'} {list(shape)}"
            raise CheckpointError(
                f"{weights} have {tensor} as {stored.dtype} {list(stored.shape)}, but {name}/config.json asks for {wanted}: {why}"
            )


@lru_cache(maxsize=32)
def _expected_tensors(name: str, class_name: str, config: str, quantization: str) -> dict[str, tuple[frozenset[str], tuple]]:
    """Name -> (dtypes that it may have, shape) of every tensor of the model that a configuration (JSON) describes."""
    settings, quantized = json.loads(config), json.loads(quantization)
    with torch.device("meta"):
        if name == "text_encoder":
            kind = getattr(import_module("transformers"), class_name)
            model = kind(kind.config_class.from_dict(settings))
        else:
            model = _built(_MODELS[class_name], settings)
        if quantized is not None and name != "text_encoder":
            quantization_config = QArtSRConfig.from_dict(quantized)
            assert isinstance(quantization_config, QArtSRConfig)  # a tuple only where unused keys are asked for
            quantizer = QArtSRQuantizer(quantization_config, pre_quantized=True)
            quantizer._process_model_before_weight_loading(model)
    exact = {layer for layer, module in model.named_modules() if isinstance(module, DeployedLayer)}
    expected = {}
    for tensor, value in model.state_dict().items():
        dtypes = frozenset({_DTYPES[value.dtype]}) if tensor.rpartition(".")[0] in exact else _FLOATS
        expected[tensor] = dtypes, tuple(value.shape)
    return expected


def _built(kind: type, settings: dict[str, Any]) -> Any:
    """An object of a diffusers class, without settings that its constructor does not know; diffusers warns about those.

    Raises:
        TypeError: a setting is of another type than the constructor's default. Some are only used in the forward pass.
    """
    known = inspect.signature(kind).parameters
    settings = {key: value for key, value in settings.items() if key in known}
    for key, value in settings.items():
        if not _is_like(value, known[key].default):
            raise TypeError(f"{key} is {str(value)[:80]!r}, where {known[key].default!r} is usual")
    return kind(**settings)


def _is_like(value: object, default: object) -> bool:
    """Whether a setting from JSON can stand in the place of a default. None and lists are left to the constructor."""
    if value is None or default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, (bool, list))
    if isinstance(default, float):
        return isinstance(value, (int, float))
    if isinstance(default, int):
        return isinstance(value, (int, float, list))
    return not isinstance(default, str) or isinstance(value, str)


def _with_present_names(
    component: Path, tensors: dict[str, StoredTensor], expected: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """The tensors, where attention of a single file may have the names that diffusers gave it before 0.16."""
    present = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    if any(component.glob("*.index*.json")):
        return tensors
    renamed = {}
    for tensor, stored in tensors.items():
        layer, _, kind = tensor.rpartition(".")
        parent, _, last = layer.rpartition(".")
        candidate = f"{parent}.{present.get(last, last)}.{kind}"
        renamed[candidate if tensor not in expected and candidate in expected else tensor] = stored
    return renamed


def _without_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Releases of transformers differ in whether names in CLIP's text model begin with `text_model.`."""
    return {tensor.removeprefix("text_model."): value for tensor, value in tensors.items()}


def _check_scheduler(folder: Path) -> None:
    name = COMPONENTS["scheduler"].config
    index = read_model_index(folder)
    config, class_name = read_json(folder / "scheduler" / name), index["scheduler"][1]
    label = f"scheduler/{name} in {folder}"
    try:
        scheduler = _built(getattr(diffusers, class_name), config)
        if named_class(index) == VIDEO_PIPELINE_CLASS:
            return  # its sigma is timestep / num_train_timesteps, which the pipeline itself checks
        alphas = scheduler.alphas_cumprod
        finite = bool(torch.isfinite(alphas).all()) and bool(((alphas >= 0) & (alphas <= 1)).all())
    except Exception as error:
        raise CheckpointError(
            f"{label} makes no noise schedule for {class_name}: {_reason(error)}. It was edited or damaged. {RENEW}"
        ) from error
    if not finite:
        raise CheckpointError(
            f"{label} makes no noise schedule: its betas lead to values of alphas_cumprod that are not from 0 to 1. {RENEW}"
        )


def _counted(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
    return f"{names[0][:120]}{more}"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{text} ({type(error).__name__})" if text else type(error).__name__
