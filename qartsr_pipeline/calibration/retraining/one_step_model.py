"""The full-precision one-step model as it is trained: encode, one step of the UNet, decode; and adapters for a large one.

A model that is too large to train whole gets low-rank adapters: LoRA (arXiv 2106.09685) as OSEDiff uses it. Every convolution and
linear layer of the UNet and of the VAE's encoder gets one of rank 4; first convolutions train whole. The layers of the time
embedding are left out: at one timestep they give a constant. `merge_adapters` adds the adapters to the weights, which leaves an
ordinary model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn.utils import parametrize

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.checkpoint_files import fetch, is_quantized
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding

RANK = 4  # OSEDiff's
LARGE = 200_000_000  # UNet parameters from which adapters are trained instead of all weights
WHOLE = ("conv_in",)  # trained whole
LEFT_OUT = ("time_embedding", "time_emb_proj")  # of the UNet


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

    The small model has such channels: `calibration/teacher/model.py` calls them anchors. A convolution's input or output
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


class LowRank(nn.Module):
    """Adds up @ down, zero at first, to a weight of shape (N, ...): down is (rank, inputs x taps), up (N, rank)."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        flat = weight.flatten(1)
        rank = min(rank, *flat.shape)
        self.down = nn.Parameter(
            torch.randn(rank, flat.shape[1], dtype=weight.dtype, device=weight.device) * flat.shape[1] ** -0.5
        )
        self.up = nn.Parameter(torch.zeros(len(flat), rank, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + (self.up @ self.down).view(weight.shape)


def is_large(model: OneStepModel) -> bool:
    """Whether the UNet has more parameters than are trained all at once."""
    return sum(parameter.numel() for parameter in model.unet.parameters()) > LARGE


def add_adapters(model: OneStepModel, rank: int = RANK, seed: int = 0) -> None:
    """Puts an adapter on the layers named at the head of this file, in place; what the model computes stays the same."""
    layers = [*_layers(model.unet, WHOLE + LEFT_OUT), *_layers(model.vae.encoder), *_layers(model.vae.quant_conv)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def _layers(model: nn.Module | None, left_out: tuple[str, ...] = ()) -> Iterable[nn.Conv2d | nn.Linear]:
    for name, module in model.named_modules() if model is not None else ():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not set(left_out) & set(name.split(".")):
            yield module


def merge_adapters(model: nn.Module) -> None:
    """Adds every adapter to its weight, in place; what the model computes stays the same."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def trained_parameters(modules: list[nn.Module]) -> list[nn.Parameter]:
    """What trains of the modules: everything or, where there are adapters, these and the layers `WHOLE`."""
    adapters = [part for module in modules for part in module.modules() if isinstance(part, LowRank)]
    if adapters:
        whole = [layer for module in modules for name, layer in module.named_children() if name in WHOLE]
        modules = [*adapters, *whole]
    return [parameter for module in modules for parameter in module.parameters()]
