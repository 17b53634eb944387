"""What offloading has to know of this pipeline: quantized layers hold their weights in buffers, and backends keep copies of them.

accelerate's sequential offloading leaves the buffers of a UNet or VAE on the device, and a copy that a backend prepared stays
there wherever its layer goes. Both are put right here, so that what is offloaded is really gone.
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
    """Whether backends keep what they prepared of the weights from call to call; forgets what they have."""
    for layer in quantized_layers(pipeline):
        layer.prepared = PreparedWeights(kept)


def offload_buffers(pipeline: DiffusionPipeline) -> None:
    """After `enable_sequential_cpu_offload`: the weights of quantized layers come and go with each call of the layer, too."""
    for layer in quantized_layers(pipeline):
        device = layer._hf_hook.execution_device
        remove_hook_from_module(layer)
        add_hook_to_module(layer, AlignDevicesHook(device, offload=True, offload_buffers=True))


def check_group_offload(pipeline: DiffusionPipeline, offload_type: str, folder: str | os.PathLike | None, streams: bool) -> None:
    """Refuses what would compute with weights that are elsewhere, and warns where nothing would be gained.

    Raises:
        ValueError: what, why, and the ways out.
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
