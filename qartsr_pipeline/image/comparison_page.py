"""A page on which two images lie over one another with a divider between them: one HTML file that needs nothing else.

Its style and script are the files of the same name beside this one. The report of a calibration is such a page, too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, features

MOST_IMAGE_PIXELS = 40_000_000
MOST_PAGE_PIXELS = 250_000_000  # browsers decode to 4 bytes a pixel, but only the images that are shown
_LARGEST_WEBP_SIDE = 16383
# Nothing is fetched, whatever a name may contain.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(frozen=True)
class NamedImage:
    """One version of a photograph.

    Attributes:
        name: by which it is chosen; the versions of one photograph have different names.
        pixels: (H, W, 3) uint8, sRGB.
        caption: shown below the name, after the size.
    """

    name: str
    pixels: np.ndarray
    caption: str = ""


@dataclass(frozen=True)
class Comparison:
    """One photograph in several versions of one size, at least two.

    Attributes:
        title: of the photograph, such as its file name.
        note: shown beside the title.
        left, right: numbers of the two versions that are shown first; by default the first and the last.
    """

    title: str
    images: Sequence[NamedImage]
    note: str = ""
    left: int = 0
    right: int = -1


def comparison_page(title: str, comparisons: Sequence[Comparison], facts: str = "") -> bytes:
    """The page. Every text is escaped; images are stored without loss.

    Args:
        facts: a sentence or two below the title.

    Raises:
        ValueError: there is nothing to compare, the versions of a photograph differ in size or do not differ in name, or the page
            would become too large for a browser.

    Example:
        >>> import numpy as np
        >>> from qartsr_pipeline.image.comparison_page import Comparison, NamedImage, comparison_page
        >>> black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
        >>> page = comparison_page("Two", [Comparison("square", [NamedImage("black", black), NamedImage("white", white)])])
        >>> page.startswith(b"<!DOCTYPE html>")
        True
    """
    if not comparisons:
        raise ValueError("there is nothing to compare: give at least one photograph in two versions")
    sizes = [(each.title, each.images[0].pixels.shape[:2], len(each.images)) for each in comparisons if each.images]
    check_page_size(sizes)
    facts = f"<p>{escape(facts)}</p>\n" if facts else ""
    return document(title, [facts, *map(comparison_html, comparisons)]).encode()


def check_page_size(sizes: Sequence[tuple[str, tuple[int, int], int]]) -> None:
    """Raises ValueError if a page of these images would be too large for a browser.

    Args:
        sizes: for each photograph its name, (height, width) of its versions, and how many versions there are.
    """
    remedy = "Cut the part that matters out of the photograph first, or enlarge it less."
    for name, (height, width), _ in sizes:
        if height * width > MOST_IMAGE_PIXELS:
            raise ValueError(
                f"{name}: its versions would have {width} x {height} pixels; a page takes images of up to"
                f" {MOST_IMAGE_PIXELS // 10**6} million. {remedy}"
            )
    total = sum(height * width * count for _, (height, width), count in sizes)
    if total > MOST_PAGE_PIXELS:
        raise ValueError(
            f"The page would hold {sum(count for *_, count in sizes)} images with {total // 10**6} million pixels together;"
            f" browsers manage about {MOST_PAGE_PIXELS // 10**6} million. Compare fewer photographs or fewer models on one page."
            f" {remedy}"
        )


def comparison_html(comparison: Comparison) -> str:
    """The element that a `document` shows as a slider; without scripts it is a list of the images.

    Raises:
        ValueError: as in `comparison_page`.
    """
    images, title = comparison.images, comparison.title
    if len(images) < 2:
        raise ValueError(f"{title}: a comparison takes at least two images, got {len(images)}")
    names = [image.name for image in images]
    if len(set(names)) < len(names):
        raise ValueError(f"{title}: two versions have the same name, of {', '.join(names)}; give them different ones")
    shapes = {image.name: (image.pixels.shape, str(image.pixels.dtype)) for image in images}
    shape, dtype = shapes[names[0]]
    if len(set(shapes.values())) > 1 or len(shape) != 3 or shape[2] != 3 or dtype != "uint8":
        raise ValueError(f"{title}: all must be uint8 of one shape (H, W, 3), got {shapes}")
    left, right = comparison.left % len(images), comparison.right % len(images)
    note = f" {escape(comparison.note)}" if comparison.note else ""
    items = "\n".join(_item(image, f"{title}, {image.name}") for image in images)
    return (
        f'<figure class="comparison" data-left="{left}" data-right="{right}">\n'
        f"<figcaption><strong>{escape(title)}</strong>{note}</figcaption>\n<ol>\n{items}\n</ol>\n</figure>"
    )


def _item(image: NamedImage, description: str) -> str:
    height, width = image.pixels.shape[:2]
    caption = f"{width} × {height}" + (f", {image.caption}" if image.caption else "")
    return (
        f'<li><img src="{data_address(*encoded(image.pixels))}" width="{width}" height="{height}" alt="{escape(description)}">'
        f"<p><strong>{escape(image.name)}</strong> <span>{escape(caption)}</span></p></li>"
    )


def encoded(pixels: np.ndarray) -> tuple[bytes, str]:
    """(H, W, 3) uint8 as the bytes of an image file without loss, and its type: WebP, or PNG where that is not possible."""
    content = io.BytesIO()
    if features.check("webp") and max(pixels.shape[:2]) <= _LARGEST_WEBP_SIDE:
        # Of the slower settings of WebP, none makes the file more than a few percent smaller.
        Image.fromarray(pixels).save(content, "WebP", lossless=True, quality=50, method=2)
        return content.getvalue(), "webp"
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue(), "png"


def data_address(content: bytes, kind: str) -> str:
    """An image file as an address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def document(title: str, parts: Sequence[str]) -> str:
    """The whole page around parts that are HTML already. Empty parts are left out."""
    body = "\n".join(part for part in parts if part)
    script = f"<script>\n{_beside('.js')}</script>\n" if '<figure class="comparison"' in body else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_beside('.css')}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n{script}</body>\n</html>\n"
    )


def _beside(suffix: str) -> str:
    return Path(__file__).with_suffix(suffix).read_text(encoding="utf-8")
