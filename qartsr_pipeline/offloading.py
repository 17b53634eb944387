"""Where the weights of a pipeline are: moving and casting it whole or not at all, and offloading.

Quantized layers hold their weights in buffers, of which kernels keep prepared copies. accelerate's sequential offloading leaves
the buffers of a UNet or VAE on the device, and a prepared copy stays on the device wherever its layer goes. Both are corrected
here, so that an offloaded layer takes no memory on the device.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from qartsr_pipeline.kernels import PreparedWeights
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.versions import PortablePipeline

if TYPE_CHECKING:
    from typing_extensions import Self  # a part of the standard library from Python 3.11 on

logger = logging.getLogger(__name__)


def quantized_layers(pipeline: DiffusionPipeline) -> list[DeployedLayer]:
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return [layer for model in models for layer in model.modules() if isinstance(layer, DeployedLayer)]


def keep_prepared(pipeline: DiffusionPipeline, kept: bool = True) -> None:
    """Has kernels keep prepared weights from call to call, or not; drops those that they have."""
    for layer in quantized_layers(pipeline):
        layer.prepared = PreparedWeights(kept)


def offload_buffers(pipeline: DiffusionPipeline) -> None:
    """After `enable_sequential_cpu_offload`: moves the buffers of quantized layers to the device for each call of the layer."""
    for layer in quantized_layers(pipeline):
        device = layer._hf_hook.execution_device  # type: ignore[union-attr]
        remove_hook_from_module(layer)
        add_hook_to_module(layer, AlignDevicesHook(device, offload=True, offload_buffers=True))


def check_cast(pipeline: DiffusionPipeline, dtype: torch.dtype | None) -> None:
    """Refuses a dtype for a pipeline that has quantized components before any component is cast.

    Raises:
        ValueError: `dtype` is not None, and one is quantized.
    """
    quantized = [name for name, part in pipeline.components.items() if is_quantized_model(part)]
    if dtype is not None and quantized:
        raise ValueError(
            f"The dtype of {' and '.join(quantized)} cannot be changed to {dtype}: quantized models are in the one that they were"
            f" loaded with. Load the pipeline with from_pretrained(.., dtype={dtype}). Nothing was changed."
        )


def is_quantized_model(part: object) -> bool:
    return isinstance(part, ModelMixin) and bool(getattr(part, "is_quantized", False))


@contextmanager
def moved_back_on_error(models: Iterable[nn.Module]) -> Iterator[None]:
    """After an error within this context the models have the tensors that they had before, where and in which dtype they were."""
    tables = [table for model in models for one in model.modules() for table in (one._parameters, one._buffers)]
    before = [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]
    values = [tensor.data for _, _, tensor in before]
    try:
        yield
    except BaseException:
        for (table, name, tensor), data in zip(before, values, strict=True):
            tensor.data = data
            table[name] = tensor  # type: ignore[assignment] # a parameter into the parameters, a buffer into the buffers
        raise


def check_group_offload(pipeline: MovablePipeline, offload_type: str, folder: str | os.PathLike | None, streams: bool) -> None:
    """Refuses arguments of `enable_group_offload` that would give wrong results, and warns about one that saves nothing.

    Raises:
        ValueError: leaf-level offloading with shared tile statistics, or a folder on disk that holds files already.
    """
    if offload_type == "leaf_level" and pipeline.share_tile_statistics:
        raise ValueError(
            "`offload_type='leaf_level'` fetches the weights of each layer when it is called, but tiles with common statistics"
            " call group normalizations past that. Use `offload_type='block_level', num_blocks_per_group=1` or"
            " enable_sequential_cpu_offload(), or set `share_tile_statistics = False` on the pipeline first."
        )
    if folder is not None and Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise ValueError(
            f"`offload_to_disk_path` {os.fspath(folder)} is not empty, and weights that an earlier model left there would be"
            " taken for this one's. Give an empty or a new folder."
        )
    if streams and quantized_layers(pipeline):
        logger.warning(
            "With `use_stream=True` diffusers offloads parameters only; quantized layers, which have buffers, stay on the device."
            " Pass `use_stream=False` to have them offloaded."
        )


class MovablePipeline(PortablePipeline):
    """Moving, casting and offloading as in diffusers, for pipelines with quantized components.

    Attributes:
        share_tile_statistics: whether tiles call group normalizations past the hooks around them.
    """

    share_tile_statistics = True

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As in diffusers; a dtype that all components have already is dropped, because quantized ones refuse any.

        Raises:
            ValueError: another dtype for a quantized pipeline. No component has changed then, nor after any other error that
                comes up while they are moved to a device.
        """
        modules = [module for module in self.components.values() if isinstance(module, nn.Module)]
        dtypes = {module.dtype for module in modules}
        if len(dtypes) == 1:
            args = tuple(arg for arg in args if arg not in dtypes)
            if kwargs.get("dtype") in dtypes:
                del kwargs["dtype"]
        check_cast(self, next((arg for arg in (*args, kwargs.get("dtype")) if isinstance(arg, torch.dtype)), None))
        with moved_back_on_error(modules):
            return super().to(*args, **kwargs)

    def enable_sequential_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; the buffers that hold quantized weights leave the device, too."""
        super().enable_sequential_cpu_offload(*args, **kwargs)
        offload_buffers(self)
        keep_prepared(self, False)

    def enable_group_offload(
        self, onload_device: torch.device, *args: Any, offload_type: str = "block_level", **kwargs: Any
    ) -> None:
        """As in diffusers, with `offload_type` by name; ValueError for what cannot work here, see `check_group_offload`."""
        check_group_offload(self, offload_type, kwargs.get("offload_to_disk_path"), kwargs.get("use_stream", False))
        super().enable_group_offload(onload_device, *args, offload_type=offload_type, **kwargs)
        keep_prepared(self, False)

    def remove_all_hooks(self) -> None:
        """As in diffusers."""
        super().remove_all_hooks()
        keep_prepared(self)
