"""Reports on a checkpoint folder and its components, for `qartsr info` and `qartsr demo`."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from qartsr_pipeline.checkpoint_files.checking import VIDEO_PIPELINE_CLASS, named_class, read_model_index
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.loading import load_kind_quietly
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.accounting import Accounting, account
from qartsr_pipeline.quantization.report import ComponentReport, describe_model
from qartsr_pipeline.quantization.video_accounting import account_of_clip


@dataclasses.dataclass(frozen=True)
class Description:
    """What a checkpoint folder consists of, and what its UNet or transformer and its VAE cost together."""

    components: list[ComponentReport]
    accounting: Accounting


def describe(folder: Path, device: str | None = None) -> Description:
    """Loads a checkpoint folder and reports on each of its components that holds weights. Sizes are those of the stored files.

    Args:
        device: the type of device that kernels are chosen for; None for the one that `qartsr upscale` would use.

    Raises:
        CheckpointError: if the folder is not a whole checkpoint.
    """
    device = device or choose_device("auto")[0]
    video = named_class(read_model_index(folder)) == VIDEO_PIPELINE_CLASS
    pipeline = load_kind_quietly(LSGQuantVideoPipeline if video else QArtSRPipeline, folder)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    components = [_as_stored(describe_model(name, model, device), folder / name) for name, model in models.items()]
    files = [component.packed_bytes for component in components if component.name in ("unet", "transformer", "vae")]
    if isinstance(pipeline, QArtSRPipeline):
        return Description(components, account(pipeline.unet, pipeline.vae, files))
    tile = pipeline.config["frames_per_chunk"], pipeline.config["tile_size"]
    return Description(components, account_of_clip(pipeline.transformer, pipeline.vae, files, *tile))


def _as_stored(report: ComponentReport, folder: Path) -> ComponentReport:
    """The report with the bytes, and for full precision the dtypes, that the files of the component have."""
    files = sorted(folder.glob("*.safetensors"))
    report = dataclasses.replace(report, packed_bytes=sum(file.stat().st_size for file in files))
    if report.quantized:
        return report
    dtypes: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            dtypes |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return dataclasses.replace(report, bits=", ".join(sorted(dtypes)).lower())


def kernels(components: Iterable[ComponentReport]) -> str:
    """Which kernels compute how many layers, such as `reference x 123`."""
    counted = Counter(layer.kernel for component in components for layer in component.layers)
    return ", ".join(f"{kernel} x {count}" for kernel, count in counted.most_common()) or "none"
