"""What Pillow's modes say about a picture. Free of torch: the files of the command line are looked at before it is imported."""

from __future__ import annotations

import PIL.Image

LUMA = (0.299, 0.587, 0.114)  # BT.601 full range, what Pillow's own conversion to "L" uses


def plain_mode(image: PIL.Image.Image) -> str:
    """L, LA, RGB or RGBA: the smallest that holds the 8-bit picture."""
    transparent = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    grey = image.mode in ("1", "L", "LA", "La")
    return ("LA" if transparent else "L") if grey else ("RGBA" if transparent else "RGB")
