"""Images without the network: conversion, resampling, tiles, colour and alpha. Plain functions on tensors.

What is defined here is free of torch: image files are read before torch is imported.
"""

from __future__ import annotations

import PIL.Image

GREY_WEIGHTS = (0.299, 0.587, 0.114)  # BT.601 full range, what Pillow's own conversion to "L" uses


def plain_mode(image: PIL.Image.Image) -> str:
    """The smallest of the modes L, LA, RGB and RGBA that holds an 8-bit image."""
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA", "La")
    return ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
