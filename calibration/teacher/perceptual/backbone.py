"""The feature stacks of VGG16 and AlexNet that LPIPS and DISTS look through, in plain PyTorch: torchvision is not needed.

Weights come from a local .safetensors file in torchvision's names (``features.0.weight`` and so on).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

# stage by stage: the layers' numbers in torchvision's `features`, with (out channels, kernel, stride, padding)
VGG16 = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
ALEXNET = ((0, 64, 11, 4, 2), (3, 192, 5, 1, 2), (6, 384, 3, 1, 1), (8, 256, 3, 1, 1), (10, 256, 3, 1, 1))
POOLED_BEFORE = {"vgg": (1, 2, 3, 4), "alex": (1, 2)}  # stages that a pooling layer precedes
MINIMUM_SIDE = {"vgg": 16, "alex": 32}  # below, a stage has no position left


class Backbone(nn.Module):
    """Frozen features of every stage.

    Args:
        network: "vgg" or "alex".
        weights: file with the weights; None leaves them random, for tests.
        stages: the first so many; the later ones look at whole objects and cost the more.
    """

    def __init__(self, network: str = "vgg", weights: str | Path | None = None, stages: int = 5):
        super().__init__()
        if network not in POOLED_BEFORE or not 1 <= stages <= 5:
            raise ValueError(f"backbone {network!r} with {stages} stages: there are vgg and alex, with 1 to 5")
        self.network = network
        self.layers = nn.ModuleDict()
        self.stages: list[list[str]] = []
        self.widths: list[int] = []  # channels that each stage ends with
        channels = 3
        shapes = VGG16 if network == "vgg" else tuple(((number, *shape),) for number, *shape in ALEXNET)
        for stage in shapes[:stages]:
            self.stages.append([str(layer[0]) for layer in stage])
            for layer in stage:
                number, out, kernel, stride, padding = layer if len(layer) == 5 else (*layer, 3, 1, 1)
                self.layers[str(number)] = nn.Conv2d(channels, out, kernel, stride, padding)
                channels = out
            self.widths.append(channels)
        if weights is not None:
            self._load(Path(weights))
        self.requires_grad_(False).eval()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _load(self, path: Path) -> None:
        """Raises OSError or ValueError that name the file and the remedy."""
        if not path.is_file():
            raise FileNotFoundError(
                f"the backbone {str(path)!r} is not there: give a .safetensors file with torchvision's {self.network}"
                " features, or leave the perceptual loss out"
            )
        try:
            state = load_file(path)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}): it is truncated or of another kind") from error
        for name, parameter in self.layers.named_parameters():
            found = state.get(f"features.{name}")
            if found is None or found.shape != parameter.shape:
                raise ValueError(
                    f"{path} holds no features.{name} of shape {tuple(parameter.shape)}: it is of another network than"
                    f" {self.network}"
                )
            parameter.data.copy_(found)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features after each stage's last ReLU, for (B, 3, H, W) normalised as the network was trained."""
        found = []
        for index, names in enumerate(self.stages):
            if index in POOLED_BEFORE[self.network]:
                x = self.pool(x)
            for name in names:
                x = F.relu(self.layers[name](x))
            found.append(x)
        return found

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The pooling between two stages."""
        return F.max_pool2d(x, 2) if self.network == "vgg" else F.max_pool2d(x, 3, 2)
