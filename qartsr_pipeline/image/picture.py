"""What the pipeline works on, whatever the user handed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Picture:
    """One picture as float32 tensors on the CPU.

    Attributes:
        rgb: (1, 3, H, W), values in [0, 1]; straight (not premultiplied) colour. Greyscale pictures have three equal channels.
        alpha: (1, 1, H, W), values in [0, 1], or None when the picture is opaque.
        greyscale: the input had one colour channel, so a PIL result has one too.
        sixteen_bit: the input had 16 bits a channel, so a greyscale PIL result has mode "I;16".
    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    greyscale: bool = False
    sixteen_bit: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.rgb.shape[-2], self.rgb.shape[-1]
