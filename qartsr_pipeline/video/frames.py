"""Between what users hand in and get back and what the video pipeline works on: frames, one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np
import PIL.Image
import torch

from qartsr_pipeline.image.conversion import to_images

ACCEPTED = (
    "a list of PIL images or of arrays (H, W, C); a numpy array (F, H, W, C) or a torch tensor (F, C, H, W) of uint8, uint16 or"
    " float in [0, 1]; or a video file"
)
DIFFERENCE = 0.12  # mean change of luma from frame to frame above which there may be a cut
SUDDEN = 4  # and so many times that of the frames before
THUMBNAIL = 32  # frames are compared at this many pixels a side, at most


def frames_of(video: object, name: str = "video") -> list[object]:
    """A clip in memory as the list of its frames, which are views.

    Args:
        video: see `ACCEPTED`.
        name: what error messages call it.

    Raises:
        TypeError, ValueError: it is of another kind or shape, or has no frames.
    """
    if isinstance(video, (np.ndarray, torch.Tensor)) and video.ndim != 4:
        layout = "(F, H, W, C)" if isinstance(video, np.ndarray) else "(F, C, H, W)"
        raise ValueError(f"`{name}` has shape {tuple(video.shape)}; expected {layout}. For one frame add an axis of length 1.")
    if isinstance(video, (PIL.Image.Image, str, bytes, os.PathLike)) or not isinstance(
        video, (list, tuple, np.ndarray, torch.Tensor)
    ):
        hint = " For frames from an iterator use pipeline.stream(frames)." if isinstance(video, Iterator) else ""
        raise TypeError(f"`{name}` must be {ACCEPTED}, but is {type(video).__name__}.{hint}")
    if len(video) == 0:
        raise ValueError(f"`{name}` has no frames. Expected {ACCEPTED}.")
    return list(video)


def checked_frames(frames: Iterable[object]) -> Iterator[torch.Tensor]:
    """Each frame as float32 (1, 3, H, W) in [0, 1].

    Args:
        frames: numpy arrays (H, W, C), torch tensors (C, H, W) or PIL images, grey or colour, as in `QArtSRPipeline`.

    Raises:
        TypeError, ValueError: a frame is of another kind, has NaN, is partly transparent, or of another size than the first; the
            message says which. ValueError: there is no frame.
    """
    size = None
    for number, frame in enumerate(frames):
        name = f"frames[{number}]"
        if isinstance(frame, (list, tuple)):
            raise TypeError(f"`{name}` is a {type(frame).__name__}; expected one frame: an array (H, W, C) or a PIL image.")
        images = to_images(frame, name)
        if len(images) != 1:
            raise ValueError(f"`{name}` holds {len(images)} images; expected one frame.")
        image = images[0]
        if image.alpha is not None and bool((image.alpha < 1).any()):
            raise ValueError(
                f"`{name}` is partly transparent, which a video model cannot enlarge. Put it on a background first, for example"
                " with PIL.Image.alpha_composite."
            )
        if size is None:
            size = image.height, image.width
        elif size != (image.height, image.width):
            raise ValueError(
                f"`{name}` has {image.width} x {image.height} pixels, but the frames before have {size[1]} x {size[0]}: all"
                " frames of a clip must have one size."
            )
        yield image.rgb
    if size is None:
        raise ValueError("There are no frames: the video is empty. Give at least one.")


class Scene:
    """The frames up to the next cut, to be read once, and whole.

    Attributes:
        following: the first frame after the cut; None before this one was read, and at the end of the clip.
    """

    def __init__(self, first: torch.Tensor, rest: Iterator[torch.Tensor]) -> None:
        self.first, self.rest = first, rest
        self.following: torch.Tensor | None = None

    def __iter__(self) -> Iterator[torch.Tensor]:
        before, usual = thumbnail(self.first), None
        yield self.first
        for frame in self.rest:
            small = thumbnail(frame)
            change = float((small - before).abs().mean())
            if change > DIFFERENCE and (usual is None or change > SUDDEN * usual):
                self.following = frame
                return
            before, usual = small, change if usual is None else 0.8 * usual + 0.2 * change
            yield frame


def scenes(frames: Iterator[torch.Tensor]) -> Iterator[Scene]:
    """Takes a clip apart at its cuts; every scene must be read to its end before the next one."""
    following = next(frames, None)
    while following is not None:
        scene = Scene(following, frames)
        yield scene
        following = scene.following


def thumbnail(frame: torch.Tensor) -> torch.Tensor:
    """Luma of (1, 3, H, W), averaged to at most `THUMBNAIL` pixels a side."""
    height, width = (min(THUMBNAIL, side) for side in frame.shape[-2:])
    return torch.nn.functional.adaptive_avg_pool2d(frame.mean(1, keepdim=True), (height, width))


def is_colourless(frame: torch.Tensor) -> bool:
    """Whether the channels of (1, 3, H, W) are equal, as in black-and-white films: a network gives them a tint."""
    return bool((frame[:, 1:] == frame[:, :1]).all())
