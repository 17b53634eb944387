"""Losses between the quantized and the full-precision model: on pictures, on what a module returns, and perceptual ones."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from qartsr_pipeline.calibration.arguments import AUTO, PERCEPTUAL_NAMES
from qartsr_pipeline.calibration.backbones import VARIABLE, find_backbone, package_file
from qartsr_pipeline.calibration.perceptual import Lpips


class Perceptual(Protocol):
    """Compares images (B, 3, H, W) in [-1, 1]; returns a scalar.

    Attributes:
        name: what it is, for the report.
    """

    name: str

    def __call__(self, image: torch.Tensor, wanted: torch.Tensor, /) -> torch.Tensor: ...


class EncoderFeatures(nn.Module):
    """Distance in the features of a frozen full-precision VAE encoder; needs nothing but the model itself.

    As in LPIPS (arXiv 1801.03924, eq. 1, all weights 1), features are normalised over channels at every position, and squared
    differences averaged over positions; the features are what each down block of the encoder returns. Ours, in the place of
    LPIPS where that is not at hand.

    Args:
        vae: a full-precision AutoencoderKL; its encoder is used as it is, and must not be quantized afterwards.
    """

    name = "features of the full-precision VAE encoder"

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.encoder = vae.encoder

    def features(self, picture: torch.Tensor) -> list[torch.Tensor]:
        """Channel-normalised output of each down block."""
        hidden = self.encoder.conv_in(picture.to(self.encoder.conv_in.weight.dtype))
        found = []
        for block in self.encoder.down_blocks:
            hidden = block(hidden)
            found.append(F.normalize(hidden.float(), dim=1, eps=1e-6))
        return found

    def forward(self, picture: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            targets = self.features(wanted)
        terms = [(a - b).square().sum(1).mean() for a, b in zip(self.features(picture), targets, strict=True)]
        return total(terms)


def load_perceptual(kind: str, vae: AutoencoderKL, weights: str | os.PathLike | None = None) -> Perceptual:
    """The perceptual loss of that kind; there is no silent change from one to the other.

    Args:
        kind: "encoder" (see `EncoderFeatures`) or "lpips" (over VGG16, see `qartsr_pipeline.calibration.perceptual`).
        vae: the full-precision VAE.
        weights: for "lpips", a local file with the backbone's weights, or a folder with one; None to look for it and, where it is
            not on this machine, to download it.

    Raises:
        ValueError: there is no such kind; or the backbone is damaged or of another network.
        ImportError: the package lpips is not installed. OSError: the backbone is unavailable.
    """
    if kind not in PERCEPTUAL_NAMES:
        raise ValueError(f"there is no perceptual loss {kind!r}; expected {' or '.join(PERCEPTUAL_NAMES)}")
    if kind == "encoder":
        return EncoderFeatures(vae)
    return Lpips("vgg", weights).to(vae.device)


def choose_perceptual(kind: str, weights: str | os.PathLike | None = None) -> tuple[str, str | None]:
    """A kind for `load_perceptual`; "auto" is LPIPS if all that it needs is on this machine. Nothing is downloaded.

    Returns:
        The kind; and, for "auto", what LPIPS lacks.

    Raises:
        FileNotFoundError: ``weights`` was given and is not there.
    """
    if kind != AUTO:
        return kind, None
    found = find_backbone("vgg", weights)
    try:
        package_file("lpips", "lpips", "weights/v0.1/vgg.pth")
    except ImportError:
        return "encoder", "the package lpips is not installed"
    return ("lpips", None) if found else ("encoder", f"there is no VGG16 backbone: give its file, or set {VARIABLE}")


def total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor, all of one shape, from the first to the last."""
    first, *others = terms
    for term in others:
        first = first + term
    return first


def norms(difference: torch.Tensor) -> torch.Tensor:
    """Root mean square of every picture or feature map of a batch, (B,)."""
    return difference.float().square().flatten(1).mean(1).clamp(min=1e-12).sqrt()


def relative_l2(output: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """|output - wanted|_2 / |wanted|_2, averaged over the batch, a scalar."""
    return (norms(output - wanted) / norms(wanted)).mean()


def picture_loss(
    weights: Mapping[str, float], picture: torch.Tensor, wanted: torch.Tensor, perceptual: Perceptual | None
) -> torch.Tensor:
    """The weighted sum of image_l2, image_l1 and perceptual; terms of other names are not the picture's.

    image_l2 is the norm, not its square, of every picture's error (root mean square), averaged over the batch: errors on smooth
    pictures, which are small and seen, then count as much as those on busy ones.
    """
    picture, wanted = picture.float(), wanted.float()
    terms = {
        "image_l2": lambda: norms(picture - wanted).mean(),
        "image_l1": lambda: F.l1_loss(picture, wanted),
        "perceptual": lambda: perceptual(picture, wanted),  # type: ignore[misc]  # the engine checks
    }
    chosen = [weight * terms[name]() for name, weight in weights.items() if name in terms and weight > 0]
    return total(chosen) if chosen else picture.new_zeros(())
