"""The family of one-step image models: UNet and VAE."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from torch import nn

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.clips import video_files_in
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import photographs_record
from qartsr_pipeline.calibration.data.pairs import sample_pair
from qartsr_pipeline.calibration.data.patches import (
    ImagePatches,
    Patches,
    PhotographPatches,
    images_record,
    list_photographs,
    pixels_of,
)
from qartsr_pipeline.calibration.family import Family, Output, outputs_of
from qartsr_pipeline.calibration.recipe import DEFAULT_KEEP, Recipe
from qartsr_pipeline.calibration.report.run_report import FinishedRun, RunReport, make_report
from qartsr_pipeline.calibration.training.blocks import Block, NamesOf, blocks_in_running_order
from qartsr_pipeline.calibration.training.losses import Perceptual, load_perceptual
from qartsr_pipeline.calibration.training.progress import SILENT, Progress
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.accounting import Accounting, Work, account, work_of
from qartsr_pipeline.quantization.calibrating import calibrating_layers
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.scheme import Folding

OBSERVED_TOGETHER = 4  # images of one batch that observers see
SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "rider.jpg"


def image_of(pipeline: QArtSRPipeline, up: torch.Tensor) -> torch.Tensor:
    """The network's image for an enlarged input (B, 3, H, W) in [-1, 1]; differentiable, colours not aligned."""
    network = pipeline.network()
    return network.decode(network.step(network.encode(up)))


class ImageFamily(Family):
    """UNet2DConditionModel and AutoencoderKL: encode an enlarged image, one UNet step, decode."""

    components = ("unet", "vae")
    calibrates_on = "images"
    keep = DEFAULT_KEEP
    block_kinds: tuple[type[nn.Module], ...] = (ResnetBlock2D, Transformer2DModel, Attention, Downsample2D, Upsample2D)

    def in_memory(self, data: Iterable[Any], name: str) -> list[np.ndarray]:
        return pixels_of(data, name)

    def source(
        self, folder: str | None, data: Sequence[np.ndarray] | None, progress: Progress = SILENT
    ) -> tuple[Patches, dict[str, Any]]:
        if data is not None:
            return ImagePatches(data), images_record(data)
        if folder:
            paths = self.files(folder)
            return PhotographPatches(paths), photographs_record(paths)
        return DeadLeaves(), {"procedural": "dead leaves"}

    def files(self, folder: str) -> list[Path]:
        try:
            return list_photographs(folder)
        except FileNotFoundError as error:
            if video_files_in(folder):
                raise FileNotFoundError(
                    f"{folder} holds clips, and the model is one for images: give a folder of photographs, or quantize a model"
                    " for clips, such as video-fp"
                ) from error
            raise

    def write_for_measuring(self, data: Sequence[np.ndarray] | None, folder: Path) -> None:
        for number, image in enumerate(data or [], 1):
            Image.fromarray(image).save(folder / f"image-{number:06d}.png")
        if data is None:
            (folder / SAMPLE.name).write_bytes(SAMPLE.read_bytes())

    def fold(self, pipeline: QArtSRPipeline) -> dict[str, Folding]:
        return {"unet": fold(pipeline.unet, pipeline.config["timestep"], pipeline.prompt_embedding(1))}

    @staticmethod
    def part_of(name: str) -> str:
        """ "vae.post_quant_conv" -> "decoder"; the others are "encoder" and "unet"."""
        if name.startswith("unet."):
            return "unet"
        return "encoder" if name.startswith(("vae.encoder.", "vae.quant_conv")) else "decoder"

    def blocks(self, pipeline: QArtSRPipeline, names_of: NamesOf = calibrating_layers) -> list[Block]:
        side = 2 * pipeline.multiple
        small = torch.zeros(1, 3, side, side, dtype=pipeline.vae.dtype)

        def run() -> torch.Tensor:
            return image_of(pipeline, small)

        return blocks_in_running_order(self.models(pipeline), self.block_kinds, self.part_of, run, names_of)

    def observed_batches(self, patches: Patches, recipe: Recipe, degradation: str, seed: int) -> list[torch.Tensor]:
        """Low-resolution images (B, 3, h, w) in [0, 1]."""
        rng = np.random.default_rng(seed)
        counts = [min(OBSERVED_TOGETHER, recipe.images - start) for start in range(0, recipe.images, OBSERVED_TOGETHER)]
        return [DEGRADATIONS[degradation](patches.sample(count, recipe.image_size, rng), SCALE, rng) for count in counts]

    def training_batch(self, patches: Patches, count: int, side: int, degradation: str, rng: np.random.Generator) -> torch.Tensor:
        """Enlarged low-resolution images (count, 3, side, side) in [-1, 1]."""
        return sample_pair(patches, count, side, rng, degradation)[0]

    def run(self, pipeline: QArtSRPipeline, batch: torch.Tensor) -> Output:
        with outputs_of({"unet": pipeline.unet}) as seen:
            image = image_of(pipeline, batch)
        return Output(image, seen["unet"])

    def perceptual(self, pipeline: QArtSRPipeline, kind: str, weights: str | os.PathLike | None) -> Perceptual:
        return load_perceptual(kind, pipeline.vae, weights)

    def report(self, run: FinishedRun, folder: Path) -> RunReport:
        return make_report(run, folder)

    def work(self, pipeline: QArtSRPipeline) -> Work:
        return work_of(pipeline.unet, pipeline.vae)

    def account(self, pipeline: QArtSRPipeline) -> Accounting:
        return account(pipeline.unet, pipeline.vae)
