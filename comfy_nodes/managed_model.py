"""A loaded checkpoint that ComfyUI's model management knows, moves and unloads."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model_folders import FOR_CLIPS, FOR_IMAGES, check_class, class_of
from .progress import interruptible

AUTO = "auto"
TIMED_TILE = 256  # side of the result that the speed is measured on
TIMED_FRAMES = 5  # of a model for clips: two whole latents of WAN's autoencoder
DTYPES = (AUTO, "float32", "float16", "bfloat16")


class QArtSRNetwork(nn.Module):
    """The pipeline's networks as one plain module. ComfyUI sets attributes on a managed module; diffusers' models refuse that.

    It keeps the dtypes that it was loaded with: scales of quantized layers, once rounded to 16 bits, would spoil every image.
    """

    def __init__(self, pipeline: Any):
        super().__init__()
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)

    def to(self, *args: Any, **kwargs: Any) -> QArtSRNetwork:
        """Moves to a device; a dtype is ignored."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        return self if device is None else super().to(device)

    def float(self) -> QArtSRNetwork:
        return self

    half = bfloat16 = double = float


@dataclass
class ManagedModel:
    """The value of a QARTSR_MODEL or QARTSR_VIDEO_MODEL connection between nodes.

    Attributes:
        name: in the list of models.
        pipeline: the loaded QArtSRPipeline or LSGQuantVideoPipeline.
        patcher: ComfyUI's handle on its networks; ComfyUI itself keeps only a weak reference.
        backend: of the kernels, or "auto".
    """

    name: str
    folder: Path
    pipeline: Any
    patcher: Any
    backend: str = AUTO

    @property
    def for_clips(self) -> bool:
        """Whether it sees many frames at once. Models for images enlarge one after another."""
        return type(self.pipeline).__name__ in FOR_CLIPS

    @property
    def device(self) -> torch.device:
        """The device that ComfyUI computes on."""
        return self.patcher.load_device

    def bring_to_device(self, memory: int = 0) -> None:
        """Moves the networks to their device if they are not there; `memory` bytes beside them are freed if possible."""
        from comfy import model_management

        model_management.load_models_gpu([self.patcher], memory_required=memory, force_full_load=True)
        network = self.patcher.model
        if any(tensor.device != self.device for tensor in network.parameters()):
            # With --novram weights stay in main memory for layers that fetch them one by one, which ours do not.
            network.to(self.device)

    @cached_property
    def seconds_per_megapixel(self) -> float:
        """Time for a megapixel of the result (of each frame, for clips) at the model's scale, measured here on one tile; once for
        each loaded model.

        Raises:
            InterruptProcessingException: cancelled by the user.
        """
        side = TIMED_TILE // self.pipeline.config.scale
        frames = TIMED_FRAMES if self.for_clips else 1
        sample = torch.linspace(0, 1, side).expand(frames, 3, side, side)
        self.bring_to_device()
        with self.kernels(), interruptible(self.patcher.model):
            for _ in range(2):  # the first call prepares kernels
                start = time.perf_counter()
                self.pipeline(sample, upscale=self.pipeline.config.scale, output_type="pt")
                seconds = time.perf_counter() - start
        return seconds * 1e6 / frames / (side * self.pipeline.config.scale) ** 2

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Inside, layers are computed by the chosen backend."""
        from qartsr_pipeline.kernels import use_backend

        if self.backend == AUTO:
            yield
        else:
            with use_backend(self.backend):
                yield


class UpscaleModel:
    """A loaded model as an UPSCALE_MODEL connection has it, for core's Upscale Image (using Model) and nodes built on it.

    Those nodes cut tiles themselves, call it on each, and blend them. What they use of it differs: older versions of core `model`
    and `to`, newer ones `patcher`, others what else an upscale model of the library spandrel has. On a GPU it has not been run.

    Attributes:
        input_channels, output_channels, supports_half, supports_bfloat16: as spandrel has them; images come as float32.
    """

    input_channels = output_channels = 3
    supports_half = supports_bfloat16 = False

    def __init__(self, managed: ManagedModel):
        self.managed = managed

    @property
    def model(self) -> nn.Module:
        """The networks, whose bytes are counted."""
        return self.managed.patcher.model

    @property
    def patcher(self) -> Any:
        """ComfyUI's handle on the networks."""
        return self.managed.patcher

    @property
    def scale(self) -> int:
        return self.managed.pipeline.config.scale

    @property
    def device(self) -> torch.device:
        """Where the networks are now."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the images that it takes."""
        return torch.float32

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> UpscaleModel:
        """Has ComfyUI bring the networks to its device. It takes them back when it needs the memory, so `cpu` does nothing; nor
        does a dtype.
        """
        if isinstance(device, (str, torch.device)) and torch.device(device).type == self.managed.device.type:
            self.managed.bring_to_device()
        return self

    def cpu(self) -> UpscaleModel:
        """As `to("cpu")`."""
        return self.to("cpu")

    def eval(self) -> UpscaleModel:
        """It is never trained."""
        return self

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in [0, 1] -> (B, 3, H', W'), on the same device and of the same dtype.

        Grey counts as RGB; a fourth channel is left out.

        Raises:
            InterruptProcessingException: cancelled by the user.
        """
        channels = image[:, :3].expand(-1, 3, -1, -1).float().cpu().clamp(0, 1)
        self.managed.bring_to_device()  # not every node calls `to`
        with self.managed.kernels(), interruptible(self.model):
            enlarged = self.managed.pipeline(channels, upscale=self.scale, output_type="pt").images
        return enlarged.to(image)


def load_model(name: str, folder: Path, backend: str, dtype: str, classes: tuple[str, ...] = FOR_IMAGES) -> ManagedModel:
    """Loads a checkpoint folder into main memory; nothing is on the GPU yet.

    Args:
        dtype: one of `DTYPES`.
        classes: what may be loaded, see `model_folders`.

    Raises:
        CheckpointError: not a complete checkpoint, or one for clips where that is not wanted.
    """
    from comfy import model_management
    from comfy.model_patcher import ModelPatcher

    from qartsr_pipeline.cli.device import choose_dtype
    from qartsr_pipeline.loading import load_kind_quietly, load_quietly
    from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline

    check_class(name, folder, classes)
    device = model_management.get_torch_device()
    chosen, _ = choose_dtype(dtype, device.type)
    pipeline: Any
    if class_of(folder) in FOR_CLIPS:
        pipeline = load_kind_quietly(LSGQuantVideoPipeline, folder, dtype=chosen)
    else:
        pipeline = load_quietly(folder, dtype=chosen, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    network = QArtSRNetwork(pipeline).eval().requires_grad_(False)
    patcher = ModelPatcher(network, load_device=device, offload_device=model_management.unet_offload_device())
    return ManagedModel(name, folder, pipeline, patcher, backend)
