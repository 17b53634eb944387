"""Losses between the quantized and the full-precision model: on pictures, on what a module returns, and perceptual ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import nn

from qartsr_pipeline.calibration.arguments import PERCEPTUAL_NAMES
from qartsr_pipeline.calibration.saving import load_tensors


class Perceptual(Protocol):
    """Compares pictures (B, 3, H, W) in [-1, 1]; returns a scalar.

    Attributes:
        name: what it is, for the report.
    """

    name: str

    def __call__(self, picture: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor: ...


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


class Lpips(nn.Module):
    """LPIPS (arXiv 1801.03924) through the `lpips` package.

    Args:
        network: the backbone, "alex" or "vgg".
        weights: a local file of torchvision's weights of that backbone; None lets the package download them.
    """

    def __init__(self, network: str = "vgg", weights: Path | None = None):
        super().__init__()
        import lpips

        self.model = lpips.LPIPS(net=network, pnet_rand=weights is not None, verbose=False)
        if weights is not None:
            self._load_backbone(weights)
        self.model.requires_grad_(False).eval()
        self.name = f"LPIPS ({network})"

    def _load_backbone(self, path: Path) -> None:
        """lpips cuts torchvision's `features` into slices that keep the layers' numbers."""
        state = load_tensors(path, "weights of the LPIPS backbone", "download it again")
        for name, parameter in self.model.net.named_parameters():
            key = "features." + ".".join(name.split(".")[-2:])
            if key not in state or state[key].shape != parameter.shape:
                raise ValueError(f"{path} holds no {key} of shape {tuple(parameter.shape)}: it is of another network")
            parameter.data.copy_(state[key])

    def forward(self, picture: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return self.model(picture, wanted).mean()


def load_perceptual(kind: str, vae: AutoencoderKL, weights: Path | None = None) -> Perceptual:
    """The perceptual loss of that kind; there is no silent change from one to the other.

    Args:
        kind: "encoder" (see `EncoderFeatures`) or "lpips".
        vae: the full-precision VAE.
        weights: for "lpips", a local file with the backbone's weights (torchvision's vgg16).

    Raises:
        ValueError: there is no such kind. ImportError, OSError, ValueError: LPIPS was asked for and is unavailable.
    """
    if kind not in PERCEPTUAL_NAMES:
        raise ValueError(f"there is no perceptual loss {kind!r}; expected {' or '.join(PERCEPTUAL_NAMES)}")
    if kind == "encoder":
        return EncoderFeatures(vae)
    if importlib.util.find_spec("lpips") is None:
        raise ImportError("--perceptual lpips needs the lpips package: pip install 'qartsr[perceptual]', or use encoder")
    try:
        return Lpips(weights=weights).to(vae.device)
    except OSError as error:
        raise OSError(f"the weights of LPIPS's backbone cannot be had ({error}): give a local file, or use encoder") from error


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
