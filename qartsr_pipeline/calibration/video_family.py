"""The family of one-step video models: WAN's transformer and its causal autoencoder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResample, WanResidualBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from PIL import Image
from torch import nn

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.clips import (
    ClipPatches,
    as_clips,
    clip_files,
    clips_of,
    clips_to_calibrate_on,
    moving_by_whole_pixels,
)
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.pairs import sample_pair
from qartsr_pipeline.calibration.data.patches import (
    Patches,
    as_pixels,
    as_tensor,
    images_record,
    read_photograph,
)
from qartsr_pipeline.calibration.family import Family, Output, outputs_of
from qartsr_pipeline.calibration.image_family import SAMPLE
from qartsr_pipeline.calibration.perceptual import Lpips
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.report.clip_report import make_clip_report
from qartsr_pipeline.calibration.report.run_report import FinishedRun, RunReport
from qartsr_pipeline.calibration.training.blocks import Block, NamesOf, blocks_in_running_order
from qartsr_pipeline.calibration.training.losses import Perceptual
from qartsr_pipeline.calibration.training.progress import SILENT, Progress
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.quantization.accounting import Accounting, Work
from qartsr_pipeline.quantization.calibrating import calibrating_layers
from qartsr_pipeline.quantization.fold_wan import fold_wan
from qartsr_pipeline.quantization.frames_as_channels import frames_as_channels
from qartsr_pipeline.quantization.rotate_wan import ROTATED_ONLINE, rotate_wan
from qartsr_pipeline.quantization.scheme import Folding
from qartsr_pipeline.quantization.video_accounting import account_of_clip, work_of_clip
from qartsr_pipeline.video.causal_vae import temporal_factor

# Latents and pixels need finer steps: in the autoencoder's first and last layers 8 bits cost more than in all others together.
KEEP = {
    "transformer.proj_out": "w8a8",
    **dict.fromkeys(("vae.*.attentions.*", "vae.*conv_in*", "vae.*conv_out*", "vae.*quant_conv*"), "w16a16"),
    "vae.*": "w8a8",
}
SAMPLE_SIDE = 192  # of the clip that is measured on where none is given


def clip_of(pipeline: LSGQuantVideoPipeline, up: torch.Tensor) -> torch.Tensor:
    """The network's frames for an enlarged clip (B, 3, F, H, W) in [-1, 1]; differentiable, colours not aligned.

    Args:
        up: F is one more than a multiple of the autoencoder's temporal factor.
    """
    network, factor = pipeline.network(), temporal_factor(pipeline.vae)
    encode, decode = network.encoder(), network.decoder()
    groups = [up] if factor == 1 else [up[:, :, :1], *up[:, :, 1:].split(factor, 2)]
    refined = network.step(torch.cat([encode(group) for group in groups], 2))
    return torch.cat([decode(part) for part in refined.split(refined.shape[2] if factor == 1 else 1, 2)], 2)


class VideoFamily(Family):
    """WanTransformer3DModel and AutoencoderKLWan: encode an enlarged clip, one transformer step, decode.

    The autoencoder is kept at 8 bits; its attention, which small models leave out, is not quantized.
    """

    components = ("transformer", "vae")
    calibrates_on = "clips"
    keep = KEEP
    block_kinds: tuple[type[nn.Module], ...] = (WanTransformerBlock, WanResidualBlock, WanAttentionBlock, WanResample)

    def in_memory(self, data: Iterable[Any], name: str) -> list[np.ndarray]:
        return clips_of(data, name)

    def source(
        self, folder: str | None, data: Sequence[np.ndarray] | None, progress: Progress = SILENT
    ) -> tuple[Patches, dict[str, Any]]:
        if data is not None:
            frames = [frame for clip in data for frame in clip]
            return ClipPatches(data), {"clips": len(data), **images_record(frames)}
        if folder:
            clips, record = clips_to_calibrate_on(folder, progress.preparing)
            return ClipPatches(clips), record
        return ClipPatches(), {"procedural": "dead leaves that move"}

    def files(self, folder: str) -> list[Path]:
        return [path for paths in clip_files(folder).values() for path in paths]

    def write_for_measuring(self, data: Sequence[np.ndarray] | None, folder: Path) -> None:
        for number, clip in enumerate([_sample_clip()] if data is None else data, 1):
            frames = folder / f"clip-{number:03d}"
            frames.mkdir()
            for index, image in enumerate(clip):
                Image.fromarray(image).save(frames / f"{index:05d}.png")

    def fold(self, pipeline: LSGQuantVideoPipeline) -> dict[str, Folding]:
        """Folds the transformer, and makes the autoencoder's convolutions such as have a quantized form."""
        frames_as_channels(pipeline.vae)
        timestep, prompt = pipeline.config["timestep"], pipeline.prompt_embedding(1)
        return {"transformer": fold_wan(pipeline.transformer, timestep, prompt)}

    def rotate(self, pipeline: LSGQuantVideoPipeline) -> tuple[str, ...]:
        rotate_wan(pipeline.transformer)
        return tuple(f"transformer.{pattern}" for pattern in ROTATED_ONLINE)

    @staticmethod
    def part_of(name: str) -> str:
        """ "vae.post_quant_conv" -> "decoder"; the others are "encoder" and "transformer"."""
        if name.startswith("transformer."):
            return "transformer"
        return "encoder" if name.startswith(("vae.encoder.", "vae.quant_conv")) else "decoder"

    def blocks(self, pipeline: LSGQuantVideoPipeline, names_of: NamesOf = calibrating_layers) -> list[Block]:
        side = 2 * pipeline.multiple
        small = torch.zeros(1, 3, ClipPatches.frames, side, side, device=pipeline.device, dtype=pipeline.vae.dtype)

        def run() -> torch.Tensor:
            return clip_of(pipeline, small)

        return blocks_in_running_order(self.models(pipeline), self.block_kinds, self.part_of, run, names_of)

    def observed_batches(self, patches: Patches, recipe: Recipe, degradation: str, seed: int) -> list[torch.Tensor]:
        """Low-resolution clips (F, 3, h, w) in [0, 1], as many as hold the recipe's number of images."""
        rng = np.random.default_rng(seed)
        clips = range(max(1, -(-recipe.images // ClipPatches.frames)))
        return [DEGRADATIONS[degradation](patches.sample(1, recipe.image_size, rng), SCALE, rng) for _ in clips]

    def training_batch(self, patches: Patches, count: int, side: int, degradation: str, rng: np.random.Generator) -> torch.Tensor:
        """Enlarged low-resolution clips (count, 3, F, side, side) in [-1, 1]."""
        return as_clips(sample_pair(patches, count, side, rng, degradation), ClipPatches.frames)[0]

    def run(self, pipeline: LSGQuantVideoPipeline, batch: torch.Tensor) -> Output:
        with outputs_of({"transformer": pipeline.transformer}) as seen:
            frames = clip_of(pipeline, batch)
        return Output(frames, seen["transformer"])

    def images_of(self, output: Output) -> torch.Tensor:
        """The frames."""
        return output.image.transpose(1, 2).flatten(0, 1)

    def perceptual(self, pipeline: LSGQuantVideoPipeline, kind: str, weights: str | os.PathLike | None) -> Perceptual:
        if kind != "lpips":
            raise ValueError(
                "the perceptual loss of a video model is lpips: install its package and backbone, or choose a recipe without one"
            )
        return Lpips("vgg", weights).to(pipeline.device)

    def report(self, run: FinishedRun, folder: Path) -> RunReport:
        return make_clip_report(run, folder)

    def work(self, pipeline: LSGQuantVideoPipeline) -> Work:
        return work_of_clip(pipeline.transformer, pipeline.vae, *_tile(pipeline))

    def account(self, pipeline: LSGQuantVideoPipeline) -> Accounting:
        return account_of_clip(pipeline.transformer, pipeline.vae, (), *_tile(pipeline))


def _tile(pipeline: LSGQuantVideoPipeline) -> tuple[int, int]:
    """Frames and side of what the transformer sees at once."""
    return pipeline.config["frames_per_chunk"], pipeline.config["tile_size"]


def _sample_clip() -> np.ndarray:
    """A pan over the sample image, (F, H, W, 3) uint8."""
    image = as_tensor(read_photograph(SAMPLE))[0]
    frames = moving_by_whole_pixels(image, ClipPatches.frames, min(SAMPLE_SIDE, *image.shape[1:]), np.random.default_rng(0))
    return np.stack([as_pixels(frame[None]) for frame in frames])
