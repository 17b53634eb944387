"""Backbones of the perceptual distances: AlexNet and VGG16, trained on ImageNet by torchvision.

The weights are looked for in this order:

1. the file or folder that is given,
2. the folder that the environment variable QARTSR_BACKBONES names,
3. PyTorch's cache, into which torchvision and lpips download them; where they are not there, they are downloaded.

A file is a .safetensors or .pth file in torchvision's names (``features.0.weight``, ..); in a folder its name begins with
``alexnet`` or ``vgg16``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

VARIABLE = "QARTSR_BACKBONES"
PACKAGES = "lpips dists-pytorch"
SUFFIXES = (".safetensors", ".pth", ".pt")


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
        stages: how many stages to use, from the first on.
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
        """Features after each stage's last ReLU, for (B, 3, H, W) normalized as the network was trained."""
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
