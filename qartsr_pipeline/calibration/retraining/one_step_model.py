"""The full-precision one-step model as it is trained: encode, one step of the UNet, decode."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.checkpoint_files import fetch, is_quantized
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding


class OneStepModel(nn.Module):
    """OSEDiff's structure. Latents are scaled to unit variance, images are (B, 3, H, W) in [-1, 1].

    Args:
        prompt_embeds: the fixed prompt, (1, tokens, channels).
        timestep: T, 0 to 999.

    Attributes:
        scaling_factor: of the latents, a scalar; 1 until it is set.
        alpha_bar: the scheduler's cumulative product of alphas at T.
    """

    prompt_embeds: torch.Tensor
    scaling_factor: torch.Tensor

    def __init__(
        self,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler: DDPMScheduler,
        prompt_embeds: torch.Tensor,
        timestep: int,
    ) -> None:
        super().__init__()
        self.vae, self.unet, self.scheduler = vae, unet, scheduler
        self.register_buffer("prompt_embeds", prompt_embeds)
        self.register_buffer("scaling_factor", torch.ones(()))
        self.set_timestep(timestep)

    @classmethod
    def from_pipeline(cls, pipeline: QArtSRPipeline) -> OneStepModel:
        """Around the components of a float32 pipeline, which are shared, not copied.

        Channels that are zero stay zero in training, see `keep_empty_channels`.
        """
        prompt = pipeline.prompt_embedding(1).detach().clone()
        model = cls(pipeline.vae, pipeline.unet, pipeline.scheduler, prompt, pipeline.config["timestep"])
        model.scaling_factor.fill_(pipeline.vae.config.scaling_factor)
        model.requires_grad_(True)
        keep_empty_channels(model)
        return model

    @classmethod
    def from_pretrained(cls, model: str | Path) -> OneStepModel:
        """The model of a full-precision pipeline folder, shipped name or Hub id in float32, at the folder's timestep.

        Raises:
            ValueError: it is quantized. CheckpointError: see `QArtSRPipeline.from_pretrained`.
        """
        folder = fetch(str(model))
        if is_quantized(folder):
            raise ValueError(f"{model} is quantized: training starts from the full-precision model it was made from")
        return cls.from_pipeline(QArtSRPipeline.from_pretrained(folder, dtype=torch.float32))

    def to_pipeline(self, dtype: torch.dtype = torch.float16) -> QArtSRPipeline:
        """A pipeline around the components, which are converted to ``dtype`` in place."""
        self.requires_grad_(False).eval()
        self.vae.register_to_config(scaling_factor=float(self.scaling_factor))
        return QArtSRPipeline(
            unet=nn.Module.to(self.unet, dtype),  # diffusers' own `to` warns about layers kept in float32; there are none
            vae=nn.Module.to(self.vae, dtype),
            scheduler=self.scheduler,
            prompt_embedding=PromptEmbedding.from_tensor(self.prompt_embeds.to(dtype)),
            timestep=self.timestep,
            scale=SCALE,
        )

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.scaling_factor.device

    def digest(self) -> str:
        """SHA-256 over everything that the model computes with: weights, prompt, scaling factor, and alpha_bar at T."""
        digest = hashlib.sha256(f"{self.timestep} {self.alpha_bar!r}".encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def set_timestep(self, timestep: int) -> None:
        """Takes the step at another T, with the same weights; see `move_timestep` for keeping the function."""
        self.timestep = timestep
        self.alpha_bar = float(self.scheduler.alphas_cumprod[timestep])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Image (B, 3, H, W) -> latent z_L (B, C, h, w)."""
        return self.vae.encode(x).latent_dist.mode() * self.scaling_factor

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Latent (B, C, h, w) -> image (B, 3, H, W)."""
        return self.vae.decode(z / self.scaling_factor).sample

    def step(self, z: torch.Tensor) -> torch.Tensor:
        """z_H = (z_L - sqrt(1 - abar) eps) / sqrt(abar), OSEDiff eq. 4; both latents (B, C, h, w)."""
        prompt = self.prompt_embeds.expand(z.shape[0], -1, -1)
        eps = self.unet(z, self.timestep, encoder_hidden_states=prompt).sample
        return (z - math.sqrt(1 - self.alpha_bar) * eps) / math.sqrt(self.alpha_bar)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Low-resolution image enlarged to the final size -> high-resolution image, both (B, 3, H, W)."""
        return self.decode(self.step(self.encode(x)))


def keep_empty_channels(model: nn.Module) -> None:
    """Masks gradients where convolutions and normalizations have channels of zeros, so that these stay zero in training.

    The small model has such channels: `calibration/teacher/anchored_init.py` calls them anchors. A convolution's input or output
    channel without any weight gets none; nor does a normalization's channel whose weight and bias are zero. In a model without
    such channels nothing changes.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            used = module.weight.detach() != 0
            outputs, inputs = used.any(dim=(1, 2, 3)), used.any(dim=(0, 2, 3))
            _mask_gradient(module.weight, outputs[:, None, None, None] & inputs[None, :, None, None])
        elif isinstance(module, nn.GroupNorm) and module.affine:
            used = (module.weight.detach() != 0) | (module.bias.detach() != 0)
            _mask_gradient(module.weight, used)
            _mask_gradient(module.bias, used)


def _mask_gradient(parameter: torch.Tensor, used: torch.Tensor) -> None:
    if not used.all() and used.any():
        parameter.register_hook(lambda gradient: gradient * used.to(gradient))
