"""ComfyUI's classes that nodes are given or stopped with, as far as the nodes use them."""

from __future__ import annotations

import io
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch


class InterruptProcessingException(Exception):
    """As in ComfyUI: no subclass of KeyboardInterrupt, so a broad `except Exception` would swallow it."""


class VideoFromFile:
    """As ComfyUI's: a clip in a file, or in the bytes of one, or so many seconds of its beginning."""

    def __init__(self, file, *, duration=None):
        self.file, self.duration = file, duration

    def get_stream_source(self):
        return self.file

    def get_duration(self):
        with self._open() as container:
            return self.duration or container.duration / 1e6

    def get_components(self):
        with self._open() as container:
            (stream,) = container.streams.video
            count = round(self.get_duration() * stream.average_rate)
            frames = [frame.to_ndarray(format="rgb24") for _, frame in zip(range(count), container.decode(video=0), strict=False)]
        images = torch.from_numpy(np.stack(frames)) / 255
        return SimpleNamespace(images=images, audio=None, frame_rate=Fraction(stream.average_rate))

    def _open(self):
        import av

        return av.open(self.file if isinstance(self.file, str) else io.BytesIO(self.file.getvalue()))
