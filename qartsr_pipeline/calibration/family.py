"""What differs between kinds of models: a family knows its components, its blocks, and how a batch is run and compared.

The engine, the recipes and the parameters of layers know nothing of UNets, autoencoders or images: they ask the pipeline's family
(`families.family_of`). A model of another kind is another subclass of `Family` in `families.FAMILIES`.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qartsr_pipeline.calibration.data.patches import Patches
from qartsr_pipeline.calibration.recipe import DEFAULT_KEEP, Recipe
from qartsr_pipeline.calibration.report.run_report import FinishedRun, RunReport
from qartsr_pipeline.calibration.training.blocks import Block, NamesOf
from qartsr_pipeline.calibration.training.losses import Perceptual, picture_loss, relative_l2
from qartsr_pipeline.calibration.training.progress import SILENT, Progress
from qartsr_pipeline.quantization.accounting import Accounting, Work
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers
from qartsr_pipeline.quantization.scheme import Folding


@dataclass(frozen=True)
class Output:
    """What one run of a network gives for a batch.

    Attributes:
        image: what the user gets, (B, 3, H, W), or of clips (B, 3, F, H, W), about [-1, 1].
        noise: what the denoising network predicts, before anything is decoded.
    """

    image: torch.Tensor
    noise: torch.Tensor


class Family(ABC):
    """One kind of one-step pipeline.

    Attributes:
        components: attributes of the pipeline whose layers are quantized.
        block_kinds: classes of the modules that are blocks; a layer outside of these is one of its own.
        calibrates_on: what that is, in words: "images".
        keep: layers that stay at more bits where a recipe leaves `keep` at its default, pattern -> bits.
    """

    components: tuple[str, ...]
    block_kinds: tuple[type[nn.Module], ...]
    calibrates_on: str
    keep: Mapping[str, str]

    @abstractmethod
    def in_memory(self, data: Iterable[Any], name: str) -> list[np.ndarray]:
        """What `quantize` was given in memory, as uint8 RGB with the pixels last: (H, W, 3) of images, (F, H, W, 3) of clips.

        Raises:
            TypeError, ValueError: it is of another kind; the message calls it by that name.
        """

    @abstractmethod
    def source(
        self, folder: str | None, data: Sequence[np.ndarray] | None, progress: Progress = SILENT
    ) -> tuple[Patches, dict[str, Any]]:
        """Where patches are cut from, and what the record says of it; from nothing, where both are None.

        Args:
            progress: is told while clips are read.

        Raises:
            OSError, ValueError: the folder is missing, or holds nothing that can be used.
        """

    @abstractmethod
    def files(self, folder: str) -> list[Path]:
        """The files of a folder, or the one file, to calibrate or to measure on.

        Raises:
            FileNotFoundError: it is missing, or holds nothing that can be used.
        """

    @abstractmethod
    def write_for_measuring(self, data: Sequence[np.ndarray] | None, folder: Path) -> None:
        """Writes what was given in memory to measure on as image files; for None, the sample that comes with the package."""

    @abstractmethod
    def fold(self, pipeline: Any) -> dict[str, Folding]:
        """Replaces what is constant at the fixed timestep and prompt, in place; component -> what was folded."""

    def rotate(self, pipeline: Any) -> tuple[str, ...] | None:
        """Rotates what layers see by changing weights, exactly and in place; the pipeline is folded.

        Returns:
            Patterns of "component.layer": of layers whose input is still to be rotated at run time. None for all, and no change.
        """
        return None

    @abstractmethod
    def blocks(self, pipeline: Any, names_of: NamesOf = calibrating_layers) -> list[Block]:
        """All blocks of a pipeline that hold layers of these names (by default: calibrating ones), in running order."""

    @abstractmethod
    def observed_batches(self, patches: Patches, recipe: Recipe, degradation: str, seed: int) -> list[torch.Tensor]:
        """What the full-precision model is observed on, to set bounds and smoothing."""

    def observe(self, pipeline: Any, batch: torch.Tensor) -> None:
        """Runs the whole pipeline on one of `observed_batches`, as a user would."""
        pipeline(batch, color_fix=None, output_type="pt")

    @abstractmethod
    def training_batch(self, patches: Patches, count: int, side: int, degradation: str, rng: np.random.Generator) -> torch.Tensor:
        """Network inputs (count, ...) from patches of ``side`` pixels."""

    @abstractmethod
    def run(self, pipeline: Any, batch: torch.Tensor) -> Output:
        """One differentiable run on a batch that `training_batch` gave."""

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
        loss = picture_loss(weights, self.images_of(output), self.images_of(target), perceptual)
        if module is not None and weights.get("module_l2"):
            loss = loss + weights["module_l2"] * relative_l2(*module)
        if weights.get("noise_l2"):
            loss = loss + weights["noise_l2"] * relative_l2(output.noise, target.noise)
        return loss

    def images_of(self, output: Output) -> torch.Tensor:
        """What loss terms of images compare, (B, 3, H, W)."""
        return output.image

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
                        numbers = tensor.detach().float()  # the same in whatever type they are held
                        digest.update(numbers.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


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
