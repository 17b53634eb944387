"""Offloading of quantized layers, which hold their weights in buffers, of which kernels keep prepared copies.

accelerate's sequential offloading leaves the buffers of a UNet or VAE on the device, and a prepared copy stays on the device
wherever its layer goes. Both are corrected here, so that an offloaded layer takes no memory on the device.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import nn

from qartsr_pipeline.kernels import PreparedWeights
from qartsr_pipeline.quantization.deployed import DeployedLayer

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


def check_group_offload(pipeline: DiffusionPipeline, offload_type: str, folder: str | os.PathLike | None, streams: bool) -> None:
    """Refuses arguments of `enable_group_offload` that would give wrong results, and warns about one that saves nothing.

    Raises:
        ValueError: leaf-level offloading with shared tile statistics, or a folder on disk that holds files already.
    """
    if offload_type == "leaf_level" and pipeline.share_tile_statistics:
        raise ValueError(
            "`offload_type='leaf_level'` fetches the weights of each layer when it is called, but tiles with common statistics"
            " call group normalisations past that. Use `offload_type='block_level', num_blocks_per_group=1` or"
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
