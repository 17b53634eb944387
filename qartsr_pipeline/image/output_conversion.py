"""From `Picture`s back to what users asked for."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch

from qartsr_pipeline.image.picture import Picture
from qartsr_pipeline.image.pil_modes import LUMA


def from_pictures(pictures: list[Picture], output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor | list:
    """Converts results.

    Args:
        pictures: at least one.
        output_type: "pil": list of PIL images, greyscale as "L", "LA" or (16-bit input) "I;16", colour as "RGB" or "RGBA".
            "np": float32 array (B, H, W, C) in [0, 1]; "pt": float32 CPU tensor (B, C, H, W) in [0, 1]; C is 3 or, with alpha, 4.
            When sizes or channels differ, "np" and "pt" give a list of (H, W, C) arrays or (C, H, W) tensors.
    """
    if output_type == "pil":
        return [to_pil(picture) for picture in pictures]
    channels = [_joined(picture) for picture in pictures]
    if output_type == "np":
        channels = [one.permute(1, 2, 0).contiguous().numpy() for one in channels]
    return stack_if_equal(channels)


def stack_if_equal(items: list) -> np.ndarray | torch.Tensor | list:
    """Stacks arrays or tensors along a new first axis; gives the list back unless all shapes are equal."""
    if len({tuple(item.shape) for item in items}) > 1:
        return items
    return np.stack(items) if isinstance(items[0], np.ndarray) else torch.stack(items)


def to_pil(picture: Picture) -> PIL.Image.Image:
    """One picture as PIL image; see `from_pictures` for the modes."""
    colour = luma(picture.rgb) if picture.greyscale else picture.rgb
    if picture.greyscale and picture.sixteen_bit and picture.alpha is None:
        return PIL.Image.fromarray((colour[0, 0].clamp(0, 1) * 65535).round().numpy().astype(np.uint16))
    values = _bytes([*colour[0], *(() if picture.alpha is None else picture.alpha[0])])
    return PIL.Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def _bytes(channels: list[torch.Tensor]) -> np.ndarray:
    """C channels (H, W) in [0, 1] -> uint8 (H, W, C); one after the other, because a large picture's floats take gigabytes."""
    values = torch.empty((*channels[0].shape, len(channels)), dtype=torch.uint8)
    for out, channel in zip(values.unbind(-1), channels, strict=True):
        out.copy_(channel.clamp(0, 1).mul_(255).round_())
    return values.numpy()


def luma(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), same range."""
    return (rgb * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _joined(picture: Picture) -> torch.Tensor:
    """(3 or 4, H, W) in [0, 1]."""
    channels = picture.rgb if picture.alpha is None else torch.cat([picture.rgb, picture.alpha], dim=1)
    return channels[0].clamp(0, 1)
