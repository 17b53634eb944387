"""Between what users hand in and get back (PIL, numpy, torch, lists of them) and what the pipeline works on, `ImageTensors`."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import PIL.Image
import torch

from qartsr_pipeline.image import GREY_WEIGHTS, pil_images

Stackable = TypeVar("Stackable", np.ndarray, torch.Tensor)

ACCEPTED = (
    "a PIL image; a numpy array (H, W), (H, W, C) or (B, H, W, C) of uint8, uint16 or float in [0, 1]; "
    "a torch tensor (H, W), (C, H, W) or (B, C, H, W) of the same; or a list of these"
)
FULL_RANGE = {"uint8": 255.0, "uint16": 65535.0}
RANGE_TOLERANCE = 1e-4  # what rounding in 16-bit floats or a resampling in float32 leaves outside [0, 1]


@dataclass
class ImageTensors:
    """One image as float32 tensors on the CPU.

    Attributes:
        rgb: (1, 3, H, W), values in [0, 1]; straight (not premultiplied) colour. Greyscale images have three equal channels.
        alpha: (1, 1, H, W), values in [0, 1], or None when the image is opaque.
        greyscale: the input had one colour channel, so a PIL result has one too.
        colourless: the three channels are equal everywhere, as in a greyscale image or in one that is stored as RGB, so those of
            the result are, too.
        sixteen_bit: the input had 16 bits a channel, so a greyscale PIL result has mode "I;16".
        keep_hidden_colors: colours of transparent pixels are enlarged as they are, as textures need it, whose alpha is no
            transparency. Otherwise they become those of their visible neighbours, so that they do not bleed into them.
    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    greyscale: bool = False
    colourless: bool = False
    sixteen_bit: bool = False
    keep_hidden_colors: bool = False

    @property
    def height(self) -> int:
        return self.rgb.shape[-2]

    @property
    def width(self) -> int:
        return self.rgb.shape[-1]


def to_images(image: object, name: str = "image", keep_hidden_colors: bool = False) -> list[ImageTensors]:
    """Converts one image, a batch, or a list that may mix kinds and sizes.

    Args:
        image: see `ACCEPTED`. Channels: 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA. PIL images are turned upright by their EXIF
            orientation; palettes and transparent colours are resolved.
        name: what error messages call it.
        keep_hidden_colors: see `ImageTensors`.

    Raises:
        TypeError: not one of the accepted types, or a dtype or mode without a defined range.
        ValueError: no image, no pixel, wrong number of dimensions or channels, NaN, infinity, values outside [0, 1].
    """
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError(f"`{name}` is an empty list. Expected {ACCEPTED}.")
        return [one for i, item in enumerate(image) for one in to_images(item, f"{name}[{i}]", keep_hidden_colors)]
    if isinstance(image, PIL.Image.Image):
        images = [_from_pil(image, name)]
    elif isinstance(image, np.ndarray):
        images = _from_numpy(image, name)
    elif isinstance(image, torch.Tensor):
        images = _from_torch(image, name)
    else:
        hint = " Open the file first: PIL.Image.open(path)." if isinstance(image, (str, os.PathLike)) else ""
        raise TypeError(f"`{name}` must be {ACCEPTED}, but is {type(image).__name__}.{hint}")
    return [replace(one, keep_hidden_colors=keep_hidden_colors) for one in images]


def _from_pil(image: PIL.Image.Image, name: str) -> ImageTensors:
    if 0 in image.size:
        raise ValueError(
            f"`{name}` has no pixels: its size is {image.size[0]} x {image.size[1]} (width x height). Give at least one."
        )
    undefined = pil_images.undefined_range(image)
    if undefined:
        raise TypeError(
            f"`{name}` has mode {image.mode!r} with {undefined}, whose range is not known. Pass numpy.asarray(image) scaled to"
            " [0, 1]."
        )
    if pil_images.has_deep_planes(image):
        raise TypeError(
            f"`{name}` is a TIFF file with 16-bit channels in planes, which Pillow decodes wrongly. Save it with interleaved"
            " channels, or pass a numpy array (H, W, C) of uint16."
        )
    key = pil_images.transparent_value(image)  # before the image is loaded
    pil_images.load(image)
    image = pil_images.turned_upright(image)
    if pil_images.is_grey_16(image):
        levels = pil_images.grey_levels(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                f"`{name}` has mode {image.mode!r} with values from {levels.min()} to {levels.max()}; expected 16-bit values, "
                "0 to 65535. Pass a float numpy array scaled to [0, 1] instead."
            )
        return _assemble(torch.from_numpy(_with_transparent(levels, key, 65535).astype(np.float32) / 65535), sixteen_bit=True)
    try:
        image = image.convert(pil_images.plain_mode(image) if key is None else "RGB" if image.mode == "RGB" else "L")
    except ValueError as error:
        raise TypeError(
            f"`{name}` has mode {image.mode!r}, which does not convert to RGB ({error}). Convert it first."
        ) from error
    return _assemble(torch.from_numpy(_with_transparent(np.asarray(image), key, 255).astype(np.float32) / 255))


def _with_transparent(pixels: np.ndarray, key: int | tuple[int, ...] | None, full: int) -> np.ndarray:
    """(H, W) or (H, W, C) -> (C, H, W), with a further channel that is 0 where the pixel has the value `key`, else `full`."""
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if key is None:
        return channels
    opaque = (channels != np.reshape(key, (-1, 1, 1))).any(0, keepdims=True)
    return np.concatenate([channels, opaque * full])


def _from_numpy(array: np.ndarray, name: str) -> list[ImageTensors]:
    kind = array.dtype.name
    if kind not in FULL_RANGE and not np.issubdtype(array.dtype, np.floating):
        raise TypeError(_dtype_error(name, kind))
    _check_dimensions(name, array.shape, channel_axis=-1)
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if array.ndim == 2:
        values = values[None, None]
    else:
        values = (values if array.ndim == 4 else values[None]).permute(0, 3, 1, 2)
    return _from_values(values, kind, name)


def _from_torch(tensor: torch.Tensor, name: str) -> list[ImageTensors]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        held = "no values (device meta)" if tensor.is_meta else f"layout {tensor.layout}"
        raise TypeError(f"`{name}` is a tensor of {held}; expected a dense one with values, as tensor.to_dense() gives.")
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in FULL_RANGE and not tensor.is_floating_point():
        raise TypeError(_dtype_error(name, kind))
    _check_dimensions(name, tuple(tensor.shape), channel_axis=-3)
    values = tensor.detach().to("cpu", torch.float32)
    return _from_values(values.reshape(-1, *((1, *values.shape) if values.ndim == 2 else values.shape[-3:])), kind, name)


def _dtype_error(name: str, kind: str) -> str:
    return (
        f"`{name}` has dtype {kind}, whose range is not defined for images; expected uint8 (0 to 255), uint16 (0 to 65535) or "
        "a float dtype (0 to 1). Convert it, for example to uint8."
    )


def _check_dimensions(name: str, shape: tuple[int, ...], channel_axis: int) -> None:
    layout = "(H, W), (H, W, C) or (B, H, W, C)" if channel_axis == -1 else "(H, W), (C, H, W) or (B, C, H, W)"
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"`{name}` has shape {shape}; expected {layout}.")
    if 0 in shape:
        raise ValueError(f"`{name}` has no pixels: its shape is {shape}. Give at least one.")
    if len(shape) > 2 and shape[channel_axis] not in (1, 2, 3, 4):
        swapped = shape[-3] if channel_axis == -1 else shape[-1]
        hint = " The channels seem to be at the other end: permute the axes." if swapped in (1, 3, 4) else ""
        raise ValueError(
            f"`{name}` has shape {shape}, read as {layout}, so {shape[channel_axis]} channels; expected 1 (grey), 2 (grey and "
            f"alpha), 3 (RGB) or 4 (RGBA).{hint}"
        )


def _from_values(values: torch.Tensor, kind: str, name: str) -> list[ImageTensors]:
    """(B, C, H, W) float32 in the range of dtype `kind` -> B images."""
    if kind in FULL_RANGE:
        values = values / FULL_RANGE[kind]
    elif not torch.isfinite(values).all():
        raise ValueError(f"`{name}` contains NaN or infinity. Repair the image first, for example with numpy.nan_to_num.")
    else:
        low, high = float(values.min()), float(values.max())
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            way = "Map [-1, 1] to [0, 1] with (x + 1) / 2." if low < 0 else "Divide 8-bit values by 255."
            raise ValueError(f"`{name}` is a float image with values from {low:.4g} to {high:.4g}; expected [0, 1]. {way}")
        values = values.clamp(0, 1)
    return [_assemble(one, sixteen_bit=kind == "uint16") for one in values]


def _assemble(channels: torch.Tensor, sixteen_bit: bool = False) -> ImageTensors:
    """(C, H, W) in [0, 1] with C = 1, 2, 3 or 4 -> ImageTensors."""
    count = channels.shape[0]
    colours, alpha = (channels[:-1], channels[-1:]) if count in (2, 4) else (channels, None)
    return ImageTensors(
        rgb=colours.expand(3, -1, -1)[None].contiguous(),
        alpha=None if alpha is None else alpha[None].contiguous(),
        greyscale=count <= 2,
        colourless=count <= 2 or bool((colours[1:] == colours[:1]).all()),
        sixteen_bit=sixteen_bit,
    )


def from_images(images: list[ImageTensors], output_type: str) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor | list:
    """Converts results.

    Args:
        images: at least one.
        output_type: "pil": list of PIL images, greyscale as "L", "LA" or (16-bit input) "I;16", colour as "RGB" or "RGBA".
            "np": float32 array (B, H, W, C) in [0, 1]; "pt": float32 CPU tensor (B, C, H, W) in [0, 1]; C is 3 or, with alpha, 4.
            When sizes or channels differ, "np" and "pt" give a list of (H, W, C) arrays or (C, H, W) tensors.
    """
    if output_type == "pil":
        return [to_pil(image) for image in images]
    if output_type == "np":
        return stack_if_equal([to_numpy(image) for image in images])
    return stack_if_equal([_joined(image) for image in images])


def stack_if_equal(items: list[Stackable]) -> Stackable | list[Stackable]:
    """Stacks arrays or tensors along a new first axis; returns the list as it is unless all shapes are equal."""
    if len({tuple(item.shape) for item in items}) > 1:
        return items
    if len(items) == 1:  # not a copy: a large image takes gigabytes
        return items[0][None]
    return np.stack(items) if isinstance(items[0], np.ndarray) else torch.stack(items)


def to_pil(image: ImageTensors) -> PIL.Image.Image:
    """One image as a PIL image; see `from_images` for the modes."""
    colour = to_grey(image.rgb) if image.greyscale else image.rgb
    if image.greyscale and image.sixteen_bit and image.alpha is None:
        return PIL.Image.fromarray((colour[0, 0].clamp(0, 1) * 65535).round().numpy().astype(np.uint16))
    values = _bytes([*colour[0], *(() if image.alpha is None else image.alpha[0])])
    return PIL.Image.fromarray(values[..., 0] if values.shape[-1] == 1 else values)


def to_numpy(image: ImageTensors) -> np.ndarray:
    """One image as float32 (H, W, 3 or 4) in [0, 1]."""
    return _joined(image).permute(1, 2, 0).contiguous().numpy()


def _bytes(channels: list[torch.Tensor]) -> np.ndarray:
    """C channels (H, W) in [0, 1] -> uint8 (H, W, C); one after the other, because a large image's floats take gigabytes."""
    values = torch.empty((*channels[0].shape, len(channels)), dtype=torch.uint8)
    for out, channel in zip(values.unbind(-1), channels, strict=True):
        out.copy_(channel.clamp(0, 1).mul_(255).round_())
    return values.numpy()


def to_grey(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W), same range."""
    return (rgb * torch.tensor(GREY_WEIGHTS).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _joined(image: ImageTensors) -> torch.Tensor:
    """(3 or 4, H, W) in [0, 1]."""
    channels = image.rgb if image.alpha is None else torch.cat([image.rgb, image.alpha], dim=1)
    return channels[0].clamp(0, 1)
