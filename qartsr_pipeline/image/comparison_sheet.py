"""Sheets of images side by side, for comparing them by eye. `comparison_page` has the page with a slider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHOWN_SIDE = 512  # larger images are cut to this around their detail
STRIP_SIDE = 224  # the same for frames of film strips
AMPLIFIED = 8  # differences of frames are shown so many times as large


def comparison_sheet(images: dict[str, np.ndarray], detail: tuple[int, int, int, int]) -> np.ndarray:
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


def film_strip(clips: Mapping[str, Sequence[np.ndarray]], reference: str | None = None, shown: int = 5) -> np.ndarray:
    """Clips of one length and size below one another under their captions, some frames of each side by side.

    Frames larger than `STRIP_SIDE` are cut to it, around the most detailed part of the last clip's first frame.

    Args:
        clips: caption -> frames (H, W, 3) uint8.
        reference: caption of a clip. Below each of the others, the absolute difference from it is shown, `AMPLIFIED` times.
        shown: at most so many frames, evenly spread.

    Returns:
        (H', W', 3) uint8.
    """
    *_, last = clips.values()
    places = sorted({round(place) for place in np.linspace(0, len(last) - 1, shown)})
    left, top, right, bottom = most_detailed(last[0])
    y, x = (
        max(0, min((low + high - STRIP_SIDE) // 2, side - STRIP_SIDE))
        for low, high, side in ((top, bottom, last[0].shape[0]), (left, right, last[0].shape[1]))
    )
    rows: dict[str, list[np.ndarray]] = {}
    for caption, frames in clips.items():
        rows[caption] = [frames[place][y : y + STRIP_SIDE, x : x + STRIP_SIDE] for place in places]
    if reference is not None:
        wanted = [frame.astype(int) for frame in rows[reference]]
        for caption in [caption for caption in clips if caption != reference]:
            pairs = zip(rows[caption], wanted, strict=True)
            differences = [(np.abs(frame - other) * AMPLIFIED).clip(0, 255).astype(np.uint8) for frame, other in pairs]
            rows[f"{caption}, {AMPLIFIED} x the difference from {reference}"] = differences
    height, width = rows[next(iter(rows))][0].shape[:2]
    bar, gap = 28, 4
    sheet = Image.new("RGB", (len(places) * (width + gap) - gap, len(rows) * (bar + height)), "white")
    draw = ImageDraw.Draw(sheet)
    for line, (caption, frames) in enumerate(rows.items()):
        above = line * (bar + height)
        draw.text((4, above + bar // 2), caption, fill="black", font=_font_for(caption, sheet.width - 8), anchor="lm")
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (column * (width + gap), above + bar))
    return np.asarray(sheet)


def _font_for(caption: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, up to 20 pixels, in which the caption takes no more than ``width``."""
    fonts = (ImageFont.load_default(size) for size in range(20, 8, -1))
    return next((font for font in fonts if font.getlength(caption) <= width), ImageFont.load_default(8))


def sheet_around_detail(images: dict[str, np.ndarray], number: int = 1) -> np.ndarray:
    """Images of one size side by side, and the most detailed part of the last one below each, (H', W', 3) uint8.

    Args:
        number: of the image, for the message.

    Raises:
        ValueError: sizes or types differ.
    """
    cut, detail = cut_to_detail(images, number)
    return comparison_sheet({name: _marked(image, detail) for name, image in cut.items()}, detail)


def cut_to_detail(images: dict[str, np.ndarray], number: int = 1) -> tuple[dict[str, np.ndarray], tuple[int, int, int, int]]:
    """At most `SHOWN_SIDE` pixels a side of each image, around the most detailed part of the last one, and where that lies.

    Args, Raises: as in `sheet_around_detail`.
    """
    shapes = {name: (image.shape, str(image.dtype)) for name, image in images.items()}
    shape, dtype = next(iter(shapes.values()))
    if len(set(shapes.values())) > 1 or len(shape) != 3 or shape[2] != 3 or dtype != "uint8":
        raise ValueError(f"image {number}: all must be uint8 of one shape (H, W, 3), got {shapes}")
    left, top, right, bottom = most_detailed(list(images.values())[-1])
    x, y = (_window(low, high, side) for low, high, side in ((left, right, shape[1]), (top, bottom, shape[0])))
    cut = {name: image[y : y + SHOWN_SIDE, x : x + SHOWN_SIDE] for name, image in images.items()}
    return cut, (left - x, top - y, right - x, bottom - y)


def _marked(image: np.ndarray, detail: tuple[int, int, int, int]) -> np.ndarray:
    """A copy with a frame around the detail, outside of it."""
    canvas = Image.fromarray(image)
    left, top, right, bottom = detail
    ImageDraw.Draw(canvas).rectangle((left - 2, top - 2, right + 1, bottom + 1), outline="#D55E00", width=2)
    return np.asarray(canvas)


def _window(low: int, high: int, side: int) -> int:
    """Where a cut of `SHOWN_SIDE` begins that has the range in its middle as far as the image allows."""
    return max(0, min((low + high - SHOWN_SIDE) // 2, side - SHOWN_SIDE))


def most_detailed(image: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a third of the shown image, where the brightness changes most from pixel to pixel."""
    height, width = image.shape[:2]
    grey = image.astype(np.float64).mean(axis=2)
    change = np.zeros((height, width))
    change[:, 1:] += np.abs(np.diff(grey, axis=1))
    change[1:] += np.abs(np.diff(grey, axis=0))
    tall, wide = (max(1, min(side, SHOWN_SIDE) // 3) for side in (height, width))
    sums = np.pad(change, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    inside = sums[tall:, wide:] - sums[:-tall, wide:] - sums[tall:, :-wide] + sums[:-tall, :-wide]
    top, left = np.unravel_index(inside.argmax(), inside.shape)
    return int(left), int(top), int(left) + wide, int(top) + tall
