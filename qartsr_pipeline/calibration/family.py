"""What differs between kinds of models: a family knows its components, its blocks, and how a batch is run and compared.

The engine, the recipes and the parameters of layers know nothing of UNets, autoencoders or images: they ask the pipeline's family
(`family_of`). A model of another kind, such as a video transformer, is another subclass of `Family` in `FAMILIES`.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.pairs import sample_pair
from qartsr_pipeline.calibration.data.patches import Patches
from qartsr_pipeline.calibration.recipe import DEFAULT_KEEP, Recipe
from qartsr_pipeline.calibration.report.run_report import FinishedRun, RunReport, make_report
from qartsr_pipeline.calibration.training.blocks import Block, blocks_in_running_order
from qartsr_pipeline.calibration.training.losses import Perceptual, load_perceptual, picture_loss, relative_l2
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.accounting import Accounting, Work, account, work_of
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.scheme import Folding

OBSERVED_TOGETHER = 4  # images of one batch that observers see


@dataclass(frozen=True)
class Output:
    """What one run of a network gives for a batch.

    Attributes:
        image: what the user gets, (B, 3, H, W) about [-1, 1].
        noise: what the denoising network predicts, before anything is decoded.
    """

    image: torch.Tensor
    noise: torch.Tensor


class Family(ABC):
    """One kind of one-step pipeline.

    Attributes:
        components: attributes of the pipeline whose layers are quantized.
        keep: layers that stay at more bits where a recipe leaves `keep` at its default, pattern -> bits.
    """

    components: tuple[str, ...]
    keep: Mapping[str, str]

    @abstractmethod
    def fold(self, pipeline: Any) -> dict[str, Folding]:
        """Replaces what is constant at the fixed timestep and prompt, in place; component -> what was folded."""

    @abstractmethod
    def blocks(self, pipeline: Any) -> list[Block]:
        """All blocks of a pipeline with calibrating layers, in the order in which they run."""

    @abstractmethod
    def observed_batches(self, patches: Patches, recipe: Recipe, degradation: str, seed: int) -> list[torch.Tensor]:
        """What the full-precision model is observed on, to set bounds and smoothing."""

    @abstractmethod
    def observe(self, pipeline: Any, batch: torch.Tensor) -> None:
        """Runs the whole pipeline on one of `observed_batches`, as a user would."""

    @abstractmethod
    def training_batch(self, patches: Patches, count: int, side: int, degradation: str, rng: np.random.Generator) -> torch.Tensor:
        """Network inputs (count, ...) from patches of ``side`` pixels."""

    @abstractmethod
    def run(self, pipeline: Any, batch: torch.Tensor) -> Output:
        """One differentiable run on a batch that `training_batch` gave."""

    @abstractmethod
    def loss(
        self,
        weights: Mapping[str, float],
        output: Output,
        target: Output,
        perceptual: Perceptual | None,
        module: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The weighted sum of a stage's loss terms, a scalar.

        Args:
            weights: term -> weight, see `recipe.Stage.loss`.
            output, target: of the quantized and of the full-precision model.
            perceptual: for the term "perceptual".
            module: output and target of the module that has its turn, for the term "module_l2".
        """

    @abstractmethod
    def perceptual(self, pipeline: Any, kind: str, weights: str | os.PathLike | None) -> Perceptual:
        """The perceptual loss of that kind for a full-precision pipeline; see `losses.load_perceptual`."""

    @abstractmethod
    def report(self, run: FinishedRun, folder: Path) -> RunReport:
        """Measures a finished run against full precision and writes its report."""

    @abstractmethod
    def work(self, pipeline: Any) -> Work:
        """What the pipeline does for one image, whatever its bits."""

    @abstractmethod
    def account(self, pipeline: Any) -> Accounting:
        """What a pipeline costs, as it would be saved."""

    def models(self, pipeline: Any) -> dict[str, nn.Module]:
        """Component -> model."""
        return {component: getattr(pipeline, component) for component in self.components}

    def layers(self, pipeline: Any) -> dict[str, CalibratingMixin]:
        """ "component.layer" -> calibrating layer."""
        return {
            f"{component}.{name}": layer
            for component, model in self.models(pipeline).items()
            for name, layer in calibrating_layers(model).items()
        }

    def kept(self, recipe: Recipe) -> Mapping[str, str]:
        """Pattern of "component.layer" names -> bits of the layers that have a number of bits of their own."""
        return self.keep if recipe.keep == DEFAULT_KEEP else recipe.keep

    def digest(self, pipeline: Any) -> str:
        """SHA-256 over the original weights and biases of all components (folded), without quantization parameters."""
        digest = hashlib.sha256()
        for component, model in self.models(pipeline).items():
            for name, module in model.named_modules():
                for key in ("weight", "bias"):
                    tensor = module._parameters.get(key)
                    if tensor is not None:
                        digest.update(f"{component}.{name}.{key}".encode())
                        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def image_of(pipeline: QArtSRPipeline, up: torch.Tensor) -> torch.Tensor:
    """The network's image for an enlarged input (B, 3, H, W) in [-1, 1]; differentiable, colours not aligned."""
    network = pipeline.network()
    return network.decode(network.step(network.encode(up)))


def tensor_of(output: Any) -> torch.Tensor:
    """What a block or model returned, without the tuple that some wrap it in."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def outputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Within, collects what the modules return, by name."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, tensor_of(output))

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class ImageFamily(Family):
    """UNet2DConditionModel and AutoencoderKL: encode an enlarged image, one UNet step, decode."""

    components = ("unet", "vae")
    keep = DEFAULT_KEEP
    block_kinds: tuple[type[nn.Module], ...] = (ResnetBlock2D, Transformer2DModel, Attention, Downsample2D, Upsample2D)

    def fold(self, pipeline: QArtSRPipeline) -> dict[str, Folding]:
        return {"unet": fold(pipeline.unet, pipeline.config["timestep"], pipeline.prompt_embedding(1))}

    @staticmethod
    def part_of(name: str) -> str:
        """ "vae.post_quant_conv" -> "decoder"; the others are "encoder" and "unet"."""
        if name.startswith("unet."):
            return "unet"
        return "encoder" if name.startswith(("vae.encoder.", "vae.quant_conv")) else "decoder"

    def blocks(self, pipeline: QArtSRPipeline) -> list[Block]:
        side = 2 * pipeline.multiple
        small = torch.zeros(1, 3, side, side, dtype=pipeline.vae.dtype)
        return blocks_in_running_order(self.models(pipeline), self.block_kinds, self.part_of, lambda: image_of(pipeline, small))

    def observed_batches(self, patches: Patches, recipe: Recipe, degradation: str, seed: int) -> list[torch.Tensor]:
        """Low-resolution images (B, 3, h, w) in [0, 1]."""
        rng = np.random.default_rng(seed)
        counts = [min(OBSERVED_TOGETHER, recipe.images - start) for start in range(0, recipe.images, OBSERVED_TOGETHER)]
        return [DEGRADATIONS[degradation](patches.sample(count, recipe.image_size, rng), SCALE, rng) for count in counts]

    def observe(self, pipeline: QArtSRPipeline, batch: torch.Tensor) -> None:
        pipeline(batch, color_fix=None, output_type="pt")

    def training_batch(self, patches: Patches, count: int, side: int, degradation: str, rng: np.random.Generator) -> torch.Tensor:
        """Enlarged low-resolution images (count, 3, side, side) in [-1, 1]."""
        return sample_pair(patches, count, side, rng, degradation)[0]

    def run(self, pipeline: QArtSRPipeline, batch: torch.Tensor) -> Output:
        with outputs_of({"unet": pipeline.unet}) as seen:
            image = image_of(pipeline, batch)
        return Output(image, seen["unet"])

    def loss(
        self,
        weights: Mapping[str, float],
        output: Output,
        target: Output,
        perceptual: Perceptual | None,
        module: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        loss = picture_loss(weights, output.image, target.image, perceptual)
        if module is not None and weights.get("module_l2"):
            loss = loss + weights["module_l2"] * relative_l2(*module)
        if weights.get("noise_l2"):
            loss = loss + weights["noise_l2"] * relative_l2(output.noise, target.noise)
        return loss

    def perceptual(self, pipeline: QArtSRPipeline, kind: str, weights: str | os.PathLike | None) -> Perceptual:
        return load_perceptual(kind, pipeline.vae, weights)

    def report(self, run: FinishedRun, folder: Path) -> RunReport:
        return make_report(run, folder)

    def work(self, pipeline: QArtSRPipeline) -> Work:
        return work_of(pipeline.unet, pipeline.vae)

    def account(self, pipeline: QArtSRPipeline) -> Accounting:
        return account(pipeline.unet, pipeline.vae)


FAMILIES: dict[type[DiffusionPipeline], Family] = {QArtSRPipeline: ImageFamily()}


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline.

    Raises:
        TypeError: there is none for pipelines of this class.
    """
    for kind, family in FAMILIES.items():
        if isinstance(pipeline, kind):
            return family
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    raise TypeError(f"{type(pipeline).__name__} cannot be quantized here; there is a family for {known}")
