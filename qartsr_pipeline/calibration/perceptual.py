"""LPIPS (arXiv 1801.03924) and DISTS (arXiv 2004.07728), as metrics and as losses.

Both compare features of a recognition network (the backbone: AlexNet or VGG16, trained on ImageNet by torchvision) with a few
weights of their own, which are read from their PyPI packages lpips and dists-pytorch. Neither package is imported: they import
torchvision, which is large, and which stops diffusers from loading where it does not match PyTorch. The values are the packages'
up to float rounding, and the gradients are faster.

The backbone's weights are looked for in this order:

1. the file or folder that is given,
2. the folder that the environment variable QARTSR_BACKBONES names,
3. PyTorch's cache, into which torchvision and lpips download them; where they are not there, they are downloaded.

A file is a .safetensors or .pth file in torchvision's names (``features.0.weight``, ..); in a folder its name begins with
``alexnet`` or ``vgg16``. Images are (B, 3, H, W) in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.autograd.function import once_differentiable

VARIABLE = "QARTSR_BACKBONES"
PACKAGES = "lpips dists-pytorch"
SUFFIXES = (".safetensors", ".pth", ".pt")
LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPSILON = 1e-10  # of a norm
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Layout:
    """How a backbone is built.

    Attributes:
        file: its name in torchvision; names of files begin with it.
        hash: of torchvision's file, the end of its name.
        stages: the layers of each stage: number in torchvision's `features`, out channels, kernel, stride, padding.
        pooled_before: stages that a pooling layer precedes.
        minimum: side of the smallest image, in pixels: with it, the last stage has one position left.
    """

    file: str
    hash: str
    stages: tuple[tuple[tuple[int, int, int, int, int], ...], ...]
    pooled_before: tuple[int, ...]
    minimum: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""
        found: dict[str, tuple[int, ...]] = {}
        channels = 3
        for number, out, kernel, _, _ in (layer for stage in self.stages for layer in stage):
            found[f"features.{number}.weight"] = (out, channels, kernel, kernel)
            found[f"features.{number}.bias"] = (out,)
            channels = out
        return found

    @property
    def cached(self) -> Path:
        """torchvision's file in PyTorch's cache."""
        return Path(torch.hub.get_dir()) / "checkpoints" / f"{self.file}-{self.hash}.pth"


def _vgg_stage(channels: int, *numbers: int) -> tuple[tuple[int, int, int, int, int], ...]:
    return tuple((number, channels, 3, 1, 1) for number in numbers)


LAYOUTS = {
    "vgg": Layout(
        "vgg16",
        "397923af",
        (
            _vgg_stage(64, 0, 2),
            _vgg_stage(128, 5, 7),
            _vgg_stage(256, 10, 12, 14),
            _vgg_stage(512, 17, 19, 21),
            _vgg_stage(512, 24, 26, 28),
        ),
        (1, 2, 3, 4),
        16,
    ),
    "alex": Layout(
        "alexnet-owt",
        "7be5be79",
        (((0, 64, 11, 4, 2),), ((3, 192, 5, 1, 2),), ((6, 384, 3, 1, 1),), ((8, 256, 3, 1, 1),), ((10, 256, 3, 1, 1),)),
        (1, 2),
        31,
    ),
}


def find_backbone(network: str, given: str | os.PathLike | None = None) -> Path | None:
    """The file with a backbone's weights on this machine, None where there is none. Downloads nothing.

    Args:
        network: "alex" or "vgg".
        given: a file, or a folder of files; it is not looked for elsewhere then.

    Raises:
        FileNotFoundError: ``given``, or the folder that QARTSR_BACKBONES names, does not exist; or ``given`` lacks the network.
    """
    layout = LAYOUTS[network]
    if given is not None:
        path = Path(given)
        found = path if path.is_file() else _in_folder(path, layout)
        if found is None:
            raise FileNotFoundError(f"no backbone {_name(layout)} at {str(path)!r}: {_remedies(layout)}")
        return found
    folder = os.environ.get(VARIABLE)
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"{VARIABLE} names {folder!r}, which is no folder: correct or unset it")
    found = _in_folder(Path(folder), layout) if folder else None
    return found or (layout.cached if layout.cached.is_file() else None)


def _name(layout: Layout) -> str:
    return layout.file.split("-")[0]


def _in_folder(folder: Path, layout: Layout) -> Path | None:
    names = [path for path in sorted(folder.glob(f"{_name(layout)}*")) if not path.name.startswith(f"{_name(layout)}_bn")]
    return next((path for suffix in SUFFIXES for path in names if path.suffix == suffix), None)


def _remedies(layout: Layout) -> str:
    return (
        f"give the path of a .safetensors or .pth file with torchvision's {_name(layout)} weights, or of a folder with one"
        f" (`backbones`, or the environment variable {VARIABLE}), or connect to the network for the download"
    )


def fetch_backbone(network: str, given: str | os.PathLike | None = None) -> Path:
    """As `find_backbone`, but downloads into PyTorch's cache what is not there.

    Raises:
        FileNotFoundError: see `find_backbone`.
        OSError: it cannot be downloaded.
    """
    found = find_backbone(network, given)
    if found is not None:
        return found
    layout = LAYOUTS[network]
    url = f"https://download.pytorch.org/models/{layout.cached.name}"
    try:
        layout.cached.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(layout.cached), hash_prefix=layout.hash)
    except (OSError, RuntimeError) as error:  # RuntimeError: another hash
        raise OSError(
            f"the backbone {_name(layout)} is not on this machine, and {url} fails ({error}): {_remedies(layout)}"
        ) from error
    return layout.cached


def load_backbone(network: str, given: str | os.PathLike | None = None) -> dict[str, torch.Tensor]:
    """A backbone's weights, by torchvision's names. Nothing that a file contains is executed.

    Raises:
        FileNotFoundError, OSError: see `fetch_backbone`.
        ValueError: the file is truncated, no file of tensors, of another network, or holds values that are not finite.
    """
    path, layout = fetch_backbone(network, given), LAYOUTS[network]
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # whatever a file of any content makes the two readers raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ValueError(
            f"{path} cannot be read as weights of {_name(layout)} ({reason}): it is truncated, or no file of tensors alone."
            " Fetch it again"
        ) from error
    found = {}
    for name, shape in layout.shapes().items():
        tensor = state.get(name) if isinstance(state, Mapping) else None
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{path} holds no {name} of shape {shape} in float32: it is of another network than {_name(layout)}."
                f" A folder may hold files of several networks; {_remedies(layout)}"
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds values that are not finite, so the file is damaged. Fetch it again")
        found[name] = tensor
    return found


class Backbone(nn.Module):
    """Frozen features of every stage.

    Args:
        network: "vgg" or "alex".
        weights: file or folder; see the module.
        stages: the first so many; the later ones look at whole objects and cost the more.
    """

    def __init__(self, network: str = "vgg", weights: str | os.PathLike | None = None, stages: int = 5):
        super().__init__()
        if network not in LAYOUTS or not 1 <= stages <= 5:
            raise ValueError(f"backbone {network!r} with {stages} stages: there are vgg and alex, with 1 to 5")
        self.network = network
        state = load_backbone(network, weights)
        self.layers = nn.ModuleDict()
        self.stages = LAYOUTS[network].stages[:stages]
        for number, out, kernel, stride, padding in (layer for stage in self.stages for layer in stage):
            weight, bias = (state[f"features.{number}.{name}"] for name in ("weight", "bias"))
            layer = nn.utils.skip_init(nn.Conv2d, weight.shape[1], out, kernel, stride, padding)
            layer.load_state_dict({"weight": weight, "bias": bias})
            self.layers[str(number)] = layer
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features after each stage's last ReLU, for (B, 3, H, W) normalised as the network was trained."""
        found = []
        for index, stage in enumerate(self.stages):
            if index in LAYOUTS[self.network].pooled_before:
                x = self.pool(x)
            for number, *_ in stage:
                x = F.relu(self.layers[str(number)](x))
            found.append(x)
        return found

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The pooling between two stages."""
        return F.max_pool2d(x, 2) if self.network == "vgg" else F.max_pool2d(x, 3, 2)


def package_file(package: str, distribution: str, name: str) -> Path:
    """A file of an installed package, which is not imported.

    Raises:
        ImportError: it is not installed, or lacks the file.
    """
    spec = find_spec(package)
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / name).is_file():
        raise ImportError(
            f"the package {distribution}, whose trained weights are needed, is not installed:"
            f" `pip install 'qartsr[metrics]'`, or `pip install --no-deps {PACKAGES}` to do without torchvision. Offline, a local"
            f" file of the backbone is needed as well (`backbones`, or the environment variable {VARIABLE})"
        )
    return folder / name


def _colours(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values)[None, :, None, None]


def _check(image: torch.Tensor, wanted: torch.Tensor, network: str, what: str) -> None:
    if image.shape != wanted.shape:
        raise ValueError(f"{what} compares images of one shape, got {tuple(image.shape)} and {tuple(wanted.shape)}")
    least = LAYOUTS[network].minimum
    if min(image.shape[-2:]) < least:
        raise ValueError(
            f"{what} needs images of at least {least} x {least} pixels, got {image.shape[-1]} x {image.shape[-2]}:"
            " leave it out, or the image"
        )


def rows_of(features: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (positions, C), without a copy where the channels come last."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _inverse_norm(rows: torch.Tensor) -> torch.Tensor:
    """1 / |row|, (positions, 1)."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return 1 / (torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=wide) + EPSILON)


class NormalizedDistance(torch.autograd.Function):
    """mean over positions of sum over channels of weight (x / |x| - y / |y|)^2, in the features' own type.

    The gradient is written out: autograd's takes as long as the network itself.

    Arguments of `apply`: x and y (B, C, H, W), weight (C,) float32. Gradients reach x alone.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x_rows, y_rows = rows_of(x), rows_of(y)
        scale = _inverse_norm(x_rows).to(x.dtype)
        normal = x_rows * scale
        difference = normal.addcmul(y_rows, _inverse_norm(y_rows).to(y.dtype), value=-1)
        ctx.shape = x.shape
        ctx.save_for_backward(normal, difference, scale, weight.to(x.dtype))
        return ((difference * difference) @ weight.to(x.dtype)).mean(dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        normal, difference, scale, weight = ctx.saved_tensors
        to_normal = difference * weight
        along = (to_normal * normal).sum(1, keepdim=True)
        to_rows = to_normal.addcmul_(normal, along, value=-1)
        to_rows.mul_(scale * (2 / len(normal) * gradient).to(scale.dtype))
        batch, channels, height, width = ctx.shape
        return to_rows.view(batch, height, width, channels).permute(0, 3, 1, 2), None, None


class Lpips(nn.Module):
    """Squared differences of channel-normalised features, weighted by channel, averaged over positions, summed over stages.

    Args:
        network: "vgg" or "alex".
        weights: the backbone's file or folder; see the module.
        stages: leave the last out at small patches: they see little and cost a lot. The metric is that of all 5.

    Raises:
        ImportError: the package lpips is not installed.
        OSError, ValueError: the backbone is unavailable, damaged or of another network.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, network: str = "vgg", weights: str | os.PathLike | None = None, stages: int = 5):
        super().__init__()
        self.network = network
        state = torch.load(package_file("lpips", "lpips", f"weights/v0.1/{network}.pth"), "cpu", weights_only=True)
        self.backbone = Backbone(network, weights, stages)
        self.register_buffer("shift", _colours(LPIPS_SHIFT))
        self.register_buffer("scale", _colours(LPIPS_SCALE))
        for index in range(stages):
            self.register_buffer(f"linear{index}", state[f"lin{index}.model.1.weight"].flatten())
        self.name = f"LPIPS ({network})" if stages == 5 else f"LPIPS ({network}, {stages} stages)"

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.backbone((image - self.shift) / self.scale)

    def forward(self, image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The mean over the batch, a scalar; gradients reach ``image`` alone.

        Raises:
            ValueError: images of two shapes, or smaller than the backbone can take.
        """
        _check(image, wanted, self.network, self.name)
        with torch.no_grad():
            targets = self.features(wanted)
        total = image.new_zeros(())
        for index, (x, y) in enumerate(zip(self.features(image), targets, strict=True)):
            total = total + NormalizedDistance.apply(x, y, getattr(self, f"linear{index}"))
        return total


class L2PooledBackbone(Backbone):
    """VGG16 with DISTS' smoothing in the place of its maxima, which let shifts of a pixel through."""

    window: torch.Tensor

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__("vgg", weights)
        line = torch.from_numpy(np.hanning(5)[1:-1]).float()
        window = line[:, None] * line[None]
        self.register_buffer("window", (window / window.sum())[None, None])

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        channels = x.shape[1]
        window = self.window.to(x.dtype).expand(channels, 1, -1, -1)
        return (F.conv2d(x.square(), window, stride=2, padding=1, groups=channels) + 1e-12).sqrt()


class Dists(nn.Module):
    """1 - similarity of the features' means (texture) and of their structure; 0 for equal images.

    Args:
        weights: VGG16's file or folder; see the module.

    Raises:
        ImportError: the package dists-pytorch is not installed.
        OSError, ValueError: the backbone is unavailable, damaged or of another network.
    """

    name = "DISTS"
    mean: torch.Tensor
    std: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor

    def __init__(self, weights: str | os.PathLike | None = None):
        super().__init__()
        shares = torch.load(package_file("DISTS_pytorch", "dists-pytorch", "weights.pt"), "cpu", weights_only=True)
        self.backbone = L2PooledBackbone(weights)
        self.register_buffer("mean", _colours(IMAGENET_MEAN))
        self.register_buffer("std", _colours(IMAGENET_STD))
        self.channels = (3, 64, 128, 256, 512, 512)
        total = shares["alpha"].detach().sum() + shares["beta"].detach().sum()
        for name in ("alpha", "beta"):
            self.register_buffer(name, shares[name].detach() / total)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        unit = (image + 1) / 2
        return [x.float() for x in (unit, *self.backbone((unit - self.mean) / self.std))]

    def forward(self, image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """The mean over the batch, a scalar; gradients reach ``image`` alone.

        Raises:
            ValueError: images of two shapes, or smaller than 16 x 16.
        """
        _check(image, wanted, "vgg", self.name)
        with torch.no_grad():
            targets = self.features(wanted)
        alpha, beta = self.alpha.split(self.channels, 1), self.beta.split(self.channels, 1)
        similarity = image.new_zeros(())
        for index, (x, y) in enumerate(zip(self.features(image), targets, strict=True)):
            x_mean, y_mean = x.mean((2, 3), keepdim=True), y.mean((2, 3), keepdim=True)
            x_variance, y_variance = x.var((2, 3), correction=0, keepdim=True), y.var((2, 3), correction=0, keepdim=True)
            covariance = (x * y).mean((2, 3), keepdim=True) - x_mean * y_mean
            texture = (2 * x_mean * y_mean + 1e-6) / (x_mean.square() + y_mean.square() + 1e-6)
            structure = (2 * covariance + 1e-6) / (x_variance + y_variance + 1e-6)
            similarity = similarity + (alpha[index] * texture + beta[index] * structure).sum(1).mean()
        return 1 - similarity
