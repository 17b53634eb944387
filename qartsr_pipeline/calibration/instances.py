"""Full-precision pipelines that a run works on: loaded, or other instances on the weights of one that is in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.freed_memory import return_freed_memory
from qartsr_pipeline.loading import load_kind_quietly
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.held_weights import hold_weights

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)
SomePipeline = TypeVar("SomePipeline", bound=CheckpointPipeline)
WITHOUT_TEXT_ENCODER: dict[str, None] = {"text_encoder": None, "tokenizer": None}


def _models(pipeline: DiffusionPipeline) -> list[nn.Module]:
    return [component for component in pipeline.components.values() if isinstance(component, nn.Module)]


def on_the_same_weights(pipeline: Pipeline) -> Pipeline:
    """Another instance whose weights are the very tensors of ``pipeline``: as long as nobody writes into them, each may get other
    layers without the other noticing. Calibration never writes into them (a hash is compared).
    """
    tensors = [tensor for model in _models(pipeline) for tensor in (*model.parameters(), *model.buffers())]
    return copy.deepcopy(pipeline, {id(tensor): tensor for tensor in tensors})


@contextmanager
def gradients_restored(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Afterwards, every parameter of the pipeline requires a gradient, or does not, as before."""
    before = [(parameter, parameter.requires_grad) for model in _models(pipeline) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def give_own_weights(pipeline: DiffusionPipeline) -> None:
    """Copies, in place, the tensors that the pipeline may share with another instance, see `on_the_same_weights`."""
    for model in _models(pipeline):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.clone()


def load_pipeline(folder: Path, kind: type[SomePipeline]) -> SomePipeline:
    """The full-precision pipeline on the CPU, without text encoder: the fixed prompt is folded into the weights."""
    return load_kind_quietly(kind, folder, **WITHOUT_TEXT_ENCODER if issubclass(kind, QArtSRPipeline) else {})


def hold_in(pipeline: CheckpointPipeline, dtype: str) -> None:
    """Holds the weights of the pipeline's networks in that type, such as "bfloat16", in place; see `held_weights`.

    Raises:
        ValueError: see `hold_weights`.
    """
    for model in _models(pipeline):
        hold_weights(model, getattr(torch, dtype))
    return_freed_memory()


def instance_of(model: SomePipeline, device: str | torch.device | None) -> SomePipeline:
    """Another instance of a pipeline in memory, in float32, on the same weights where these are so already.

    Raises:
        ValueError: its components are moved around by offloading.
    """
    check_not_offloaded(model)
    pipeline = on_the_same_weights(model)
    if isinstance(pipeline, QArtSRPipeline):
        pipeline.register_modules(**WITHOUT_TEXT_ENCODER)
    wanted = torch.device(device or model.device)
    if model.dtype != torch.float32 or wanted.type != model.device.type or wanted.index not in (None, model.device.index):
        pipeline = copy.deepcopy(pipeline).to(wanted, torch.float32)
    return pipeline


def check_not_offloaded(model: DiffusionPipeline) -> None:
    """Raises ValueError if the pipeline's components are moved around by offloading."""
    if getattr(model, "_all_hooks", None):  # a private attribute of diffusers'
        raise ValueError("the pipeline is offloaded: call its remove_all_hooks(), or give its folder")
