"""Frames of FFmpeg to R'G'B' in floats and back.

FFmpeg's own scaler is not used for this: into formats of more than 8 bits its results are up to a whole step of 8
bits off in one direction (libswscale 9.5), which is a shift of tone. Here Y'CbCr and R'G'B' follow ITU-T H.273 in float32.

Chroma is taken to lie at every second column, between two rows: the default of MPEG-2, H.264, HEVC and AV1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from qartsr_pipeline.video_files.clip import PixelKind, import_av
from qartsr_pipeline.video_files.colour import LUMA, RGB, Colour

if TYPE_CHECKING:
    from av import VideoFrame

# Formats whose channels are not in planes, and the planar one that holds the same numbers.
_PLANAR = {
    **dict.fromkeys(("nv12", "nv21"), "yuv420p"),
    **dict.fromkeys(("nv16",), "yuv422p"),
    **dict.fromkeys(("nv24", "nv42"), "yuv444p"),
    **dict.fromkeys(("yuyv422", "uyvy422", "yvyu422"), "yuv422p"),
    **{
        f"p{number}{bits}{order}": f"yuv{chroma}p{bits}le"
        for number, chroma in ((0, 420), (2, 422), (4, 444))
        for bits in (10, 12, 16)
        for order in ("le", "be")
    },
    **dict.fromkeys(("nv20le", "nv20be", "y210le"), "yuv422p10le"),
}


# libswscale 9.5 takes the wrong bits of the first ones; the others have their numbers in the upper bits of two bytes.
_MISREAD = ("555be", "565be", "msble", "msbbe")


class UnreadablePixels(ValueError):
    """Why the pixels cannot be read, as a sentence whose subject is the file."""


def kind_of(format_name: str) -> PixelKind:
    """The kind of a pixel format of FFmpeg.

    Raises:
        UnreadablePixels: one that is not supported.
    """
    av = import_av()
    pixel_format = av.VideoFormat(_PLANAR.get(format_name, format_name), 16, 16)
    depth = max(component.bits for component in pixel_format.components)
    if depth > 16 or "f32" in format_name or "f16" in format_name:
        raise UnreadablePixels(
            f"has floating-point pixels ({format_name}), whose range is not known. Convert it to 10 or 16 bits first"
        )
    alpha = any(component.is_alpha for component in pixel_format.components) or pixel_format.has_palette
    is_rgb, convert = pixel_format.is_rgb or pixel_format.has_palette, f"({format_name}). Convert it to yuv420p first"
    if pixel_format.is_bit_stream or format_name.endswith(_MISREAD):
        raise UnreadablePixels(f"has a pixel format that is not supported {convert}")
    if is_rgb:
        return PixelKind(8 if depth <= 8 else depth, "rgb", alpha)
    if len(pixel_format.components) <= 2:
        if depth < 8:
            raise UnreadablePixels(f"has pixels of {depth} bits ({format_name}). Convert it to 8 bits first")
        return PixelKind(depth, "grey", alpha)
    if not pixel_format.is_planar or format_name.startswith("xyz"):
        raise UnreadablePixels(f"has a pixel format that is not supported {convert}")
    columns, rows = _strides(pixel_format)
    return PixelKind(depth, "420" if rows > 1 else "422" if columns > 1 else "444", alpha)


def _strides(pixel_format: object) -> tuple[int, int]:
    """How many columns and rows of luma share one chroma sample; the format has 16 of each."""
    return 16 // pixel_format.chroma_width(), 16 // pixel_format.chroma_height()  # type: ignore[attr-defined]


def to_rgb(frame: VideoFrame, colour: Colour) -> np.ndarray:
    """(H, W, 3) float32 in [0, 1], with the frame's own transfer function. Transparent pixels are laid over white."""
    kind = kind_of(frame.format.name)
    if kind.chroma == "rgb":
        rgb, alpha = _from_rgb(frame, kind)
    else:
        rgb, alpha = _from_ycbcr(frame, kind, colour)
    if alpha is not None:
        rgb = rgb * alpha[..., None] + (1 - alpha[..., None])
    return rgb.clamp_(0, 1).numpy()


def _from_rgb(frame: VideoFrame, kind: PixelKind) -> tuple[torch.Tensor, torch.Tensor | None]:
    largest = 2**kind.depth - 1
    if frame.format.name.startswith("gbr"):
        green, blue, red, *alpha = (_plane(frame, index, kind.depth) / largest for index in range(len(frame.planes)))
        return torch.stack([red, green, blue], -1), alpha[0] if alpha else None
    if kind.depth == 8:
        name = "rgba" if kind.alpha else "rgb24"
    else:  # packed formats hold 16 bits; FFmpeg's of 10 bits in 32 are repeated upwards
        name, largest = ("rgba64le" if kind.alpha else "rgb48le"), 65535
    packed = frame if frame.format.name == name else frame.reformat(format=name)
    values = torch.from_numpy(packed.to_ndarray().astype(np.float32)) / largest
    return values[..., :3].contiguous(), values[..., 3] if kind.alpha else None


def _from_ycbcr(frame: VideoFrame, kind: PixelKind, colour: Colour) -> tuple[torch.Tensor, torch.Tensor | None]:
    planar = _PLANAR.get(frame.format.name)
    if planar:
        frame = frame.reformat(format=planar)
    black, luma_range, middle, chroma_range = _levels(kind.depth, colour.full_range)
    together = 2 if kind.alpha and kind.chroma == "grey" else 1  # such formats have both in one plane
    luma = (_plane(frame, 0, kind.depth, together) - black) / luma_range
    last = _plane(frame, len(frame.planes) - 1, kind.depth, together, together - 1)
    alpha = last / (2**kind.depth - 1) if kind.alpha else None
    if kind.chroma == "grey":
        return luma[..., None].repeat(1, 1, 3), alpha
    height, width = luma.shape
    chroma = [(_plane(frame, index, kind.depth) - middle) / chroma_range for index in (1, 2)]
    stretched = []
    for c in chroma:
        while c.shape[1] < width:
            c = _doubled(c, 1, width if c.shape[1] * 2 >= width else c.shape[1] * 2, cosited=True)
        while c.shape[0] < height:
            c = _doubled(c, 0, height if c.shape[0] * 2 >= height else c.shape[0] * 2, cosited=False)
        stretched.append(c)
    cb, cr = stretched
    red_share, blue_share = LUMA[colour.matrix]
    red = luma + cr * (2 * (1 - red_share))
    blue = luma + cb * (2 * (1 - blue_share))
    # Not from red and blue: where there is no colour, all three are to be the luma exactly.
    off = cr * (2 * (1 - red_share) * red_share) + cb * (2 * (1 - blue_share) * blue_share)
    green = luma - off / (1 - red_share - blue_share)
    return torch.stack([red, green, blue], -1), alpha


def from_rgb(pixels: np.ndarray, kind: PixelKind, colour: Colour) -> VideoFrame:
    """(H, W, 3) float in [0, 1] -> a frame of `kind.format`."""
    av = import_av()
    rgb = torch.from_numpy(np.ascontiguousarray(pixels, dtype=np.float32)).clamp(0, 1)
    height, width = rgb.shape[:2]
    frame = av.VideoFrame(width, height, kind.format)
    red, green, blue = rgb.unbind(-1)
    largest = 2**kind.depth - 1
    if colour.matrix == RGB:
        for index, plane in enumerate((green, blue, red)):
            _fill(frame, index, plane * largest, kind.depth)
        return frame
    black, luma_range, middle, chroma_range = _levels(kind.depth, colour.full_range)
    red_share, blue_share = LUMA[colour.matrix]
    luma = red * red_share + green * (1 - red_share - blue_share) + blue * blue_share
    _fill(frame, 0, luma * luma_range + black, kind.depth)
    for index, (channel, share) in enumerate(((blue, blue_share), (red, red_share)), 1):
        chroma = (channel - luma) / (2 * (1 - share))
        if kind.chroma != "444":
            chroma = _halved(chroma, 1, cosited=True)
        if kind.chroma == "420":
            chroma = _halved(chroma, 0, cosited=False)
        _fill(frame, index, chroma * chroma_range + middle, kind.depth)
    return frame


def _levels(depth: int, full_range: bool) -> tuple[float, float, float, float]:
    """Black and its distance from white; no colour, and the distance between the two ends of chroma."""
    if full_range:
        return 0, 2**depth - 1, 2 ** (depth - 1), 2**depth - 1
    step = 2 ** (depth - 8)
    return 16 * step, 219 * step, 128 * step, 224 * step


def _plane(frame: VideoFrame, index: int, depth: int, step: int = 1, first: int = 0) -> torch.Tensor:
    """(H, W) float32 of one plane's numbers; of every ``step``-th from the ``first`` on."""
    plane, dtype = frame.planes[index], np.dtype(np.uint8 if depth == 8 else ">u2" if frame.format.name.endswith("be") else "<u2")
    rows = np.frombuffer(memoryview(plane), dtype)[: plane.height * plane.line_size // dtype.itemsize].reshape(plane.height, -1)
    return torch.from_numpy(rows[:, first : step * plane.width : step].astype(np.float32))


def _fill(frame: VideoFrame, index: int, values: torch.Tensor, depth: int) -> None:
    plane, dtype = frame.planes[index], np.dtype(np.uint8 if depth == 8 else "<u2")
    rows = np.zeros((plane.buffer_size // plane.line_size, plane.line_size // dtype.itemsize), dtype)
    rows[: plane.height, : plane.width] = values.round().clamp_(0, 2**depth - 1).numpy()
    plane.update(rows.tobytes())


def _doubled(chroma: torch.Tensor, axis: int, length: int, cosited: bool) -> torch.Tensor:
    """Twice as many samples along an axis, or one fewer: each at the first of its two places (`cosited`), or between them."""
    c = chroma.movedim(axis, -1)
    before, after = torch.cat([c[..., :1], c[..., :-1]], -1), torch.cat([c[..., 1:], c[..., -1:]], -1)
    pair = (c, (c + after) / 2) if cosited else (0.75 * c + 0.25 * before, 0.75 * c + 0.25 * after)
    return torch.stack(pair, -1).flatten(-2)[..., :length].movedim(-1, axis)


def _halved(chroma: torch.Tensor, axis: int, cosited: bool) -> torch.Tensor:
    """The opposite of `_doubled`; an odd last sample counts twice."""
    c = chroma.movedim(axis, -1)
    if c.shape[-1] % 2:
        c = torch.cat([c, c[..., -1:]], -1)
    even, odd = c[..., ::2], c[..., 1::2]
    if not cosited:
        return ((even + odd) / 2).movedim(-1, axis)
    before = torch.cat([even[..., :1], odd[..., :-1]], -1)
    return (even / 2 + (before + odd) / 4).movedim(-1, axis)
