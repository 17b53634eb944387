"""Extended end-to-end training (ET, QArtSR's third stage): all quantization parameters at once, the original weights frozen.

The loss compares the quantized model's picture with the full-precision model's, I_q with I_fp. QArtSR adds LPIPS to the L2 term;
here it is the L2 term alone (our reading of what remains without a perceptual network at hand).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from calibration.data.pairs import MARGIN, Patches, degraded_pair
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers


@dataclass(frozen=True)
class Extended:
    """Settings of the training.

    Attributes:
        steps: optimizer steps; 0 for none.
        patch: side of the high-resolution patches in pixels.
        batch: patches a step.
        lr: step size relative to the size of what is trained: a bound moves by about this share of itself in one step.
    """

    steps: int = 0
    patch: int = 96
    batch: int = 4
    lr: float = 3e-3


def picture_of(pipeline: QArtSRPipeline, up: torch.Tensor) -> torch.Tensor:
    """The network's picture for an enlarged input (B, 3, H, W) in [-1, 1]; differentiable, colours as they come."""
    network = pipeline.network()
    return network.decode(network.step(network.encode(up)))


def _step_sizes(layer: CalibratingMixin, lr: float) -> dict[str, float]:
    """Absolute learning rate of each of a layer's own parameters."""
    sizes = {}
    for name, parameter in layer.named_parameters(recurse=False):
        if not parameter.requires_grad:
            continue
        size = float(parameter.detach().abs().mean())
        if name == "log_smooth":
            size = 1.0  # phi is trained in the logarithm: already relative
        elif name == "adapter_up":  # starts at 0: measured by the change of the weight that it brings
            size = float(layer.weight.abs().mean()) * math.sqrt(layer.adapter_down.shape[1] / layer.adapter_down.shape[0])
        elif name == "adapter_down":
            size *= 0.1
        sizes[name] = lr * max(size, 1e-6)
    return sizes


def quantization_parameters(pipeline: QArtSRPipeline, lr: float) -> list[dict]:
    """Optimizer groups over the parameters of all calibrating layers, shared ones once."""
    groups, seen = [], set()
    for model in (pipeline.unet, pipeline.vae):
        for layer in calibrating_layers(model).values():
            for name, size in _step_sizes(layer, lr).items():
                parameter = layer.get_parameter(name)
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    groups.append({"params": [parameter], "lr": size, "relative": size})
    return groups


@torch.no_grad()
def keep_zero_inside(pipeline: QArtSRPipeline) -> None:
    """Puts bounds that crossed 0 back onto it: beyond, quantization treats them as 0 and no gradient would bring them back."""
    for model in (pipeline.unet, pipeline.vae):
        for layer in calibrating_layers(model).values():
            for name, parameter in layer.named_parameters(recurse=False):
                if name.endswith("_lower"):
                    parameter.clamp_(max=0)
                elif name.endswith("_upper"):
                    parameter.clamp_(min=0)


def train(
    pipeline: QArtSRPipeline, full_precision: QArtSRPipeline, patches: Patches, settings: Extended, seed: int = 0
) -> list[float]:
    """Trains in place and returns the loss of every step.

    Raises:
        FloatingPointError: when the loss is not finite; the parameters are then as before that step.
    """
    groups = quantization_parameters(pipeline, settings.lr)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    losses = []
    for step in tqdm(range(settings.steps), desc="extended training", disable=settings.steps == 0):
        rng = np.random.default_rng([seed, step])
        up, _ = degraded_pair(patches.sample(settings.batch, settings.patch + 2 * MARGIN, rng))
        with torch.no_grad():
            wanted = picture_of(full_precision, up)
        loss = F.mse_loss(picture_of(pipeline, up), wanted)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {step} is {float(loss)}: use a smaller learning rate than {settings.lr}")
        rate = min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["relative"] * rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        keep_zero_inside(pipeline)
        losses.append(float(loss.detach()))
    return losses
