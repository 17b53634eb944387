"""Sheets of images side by side, for comparing them by eye."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def compare(images: dict[str, np.ndarray], detail: tuple[int, int, int, int]) -> np.ndarray:
    """Images of one size side by side under their captions, and below each an enlarged detail of it.

    Args:
        images: caption -> (H, W, 3) uint8.
        detail: left, top, right, bottom of the detail; it is enlarged to the images' width, without smoothing.

    Returns:
        (H', W', 3) uint8.
    """
    height, width = next(iter(images.values())).shape[:2]
    bar, gap = 32, 8
    detail_height = round(width * (detail[3] - detail[1]) / (detail[2] - detail[0]))
    sheet = Image.new("RGB", (len(images) * (width + gap) - gap, bar + height + gap + detail_height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (caption, pixels) in enumerate(images.items()):
        left, image = column * (width + gap), Image.fromarray(pixels)
        draw.text((left + 4, bar // 2), caption, fill="black", font=_font_for(caption, width - 8), anchor="lm")
        sheet.paste(image, (left, bar))
        enlarged = image.crop(detail).resize((width, detail_height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (left, bar + height + gap))
    return np.asarray(sheet)


def _font_for(caption: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, up to 20 pixels, in which the caption takes no more than ``width``."""
    fonts = (ImageFont.load_default(size) for size in range(20, 8, -1))
    return next((font for font in fonts if font.getlength(caption) <= width), ImageFont.load_default(8))
