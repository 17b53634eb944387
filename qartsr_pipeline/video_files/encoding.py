"""Which codec, pixel format and quality a result is written with, and the encoder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from qartsr_pipeline.video_files.clip import Clip, PixelKind, VideoFileError, import_av, seconds_of
from qartsr_pipeline.video_files.colour import Colour, HdrMetadata
from qartsr_pipeline.video_files.formats import CODECS, CONTAINERS, Codec, check_codec
from qartsr_pipeline.video_files.pixels import from_rgb
from qartsr_pipeline.whole_files import NO_ROOM

_RGB_DEPTHS, _YCBCR_DEPTHS = (8, 9, 10, 12, 14, 16), (8, 9, 10, 12, 16)  # FFV1's planar ones
_EXACT_RGB = PixelKind(16, "rgb")


@dataclass(frozen=True)
class Encoding:
    """How a result is written.

    Attributes:
        codec: a key of `CODECS`.
        height, width: of its frames.
        rate: frames a second on average; it guides the encoder, but the times of frames are those of the clip.
    """

    codec: str
    crf: int | None
    kind: PixelKind
    colour: Colour
    height: int
    width: int
    rate: Fraction
    aspect: Fraction = Fraction(1)
    hdr: HdrMetadata | None = None


def choose_encoding(
    clip: Clip, target: Path, height: int, width: int, codec: str | None = None, crf: int | None = None
) -> tuple[Encoding, list[str]]:
    """How a clip's frames, enlarged to height x width, are written, and what changes, one sentence each.

    Args:
        codec: None for H.264 for 8 bits, HEVC for more, where files of this name can hold them.
        crf: None for the codec's default.

    Raises:
        VideoFileError: see `check_codec`; or the codec cannot hold frames of this size.
    """
    check_codec(target, codec, crf)
    notices: list[str] = []
    hevc = "--codec hevc" if "hevc" in CONTAINERS[target.suffix.lower()] else "A .mkv with --codec hevc"
    if target.suffix.lower() == ".gif":
        encoding = Encoding("ffv1", None, replace(_EXACT_RGB, depth=10), Colour(0, True), height, width, clip.rate)
        if clip.colour.is_hdr:
            raise VideoFileError(f"{clip.path} is in HDR, which GIF cannot hold. Write a .mp4 or .mkv.")
        return encoding, [
            f"{target.name}: GIF holds 256 colours a frame, and times in hundredths of a second.",
            *stretched(clip, target),
        ]
    codecs = CONTAINERS[target.suffix.lower()]
    codec = codec or ("hevc" if "hevc" in codecs and clip.kind.depth > 8 else codecs[0])
    spec = CODECS[codec]
    chroma = _chroma(clip.kind.chroma, spec, height, width)
    if chroma is None:
        raise VideoFileError(
            f"{target} would have {width} x {height} pixels, but {codec} needs even numbers. Choose another --upscale or --codec."
        )
    if clip.kind.chroma in ("422", "444") and chroma == "420":
        notices.append(
            f"{target.name}: {codec} holds a quarter of the colour samples (4:2:0), the clip has more. {hevc} keeps them."
        )
    elif chroma == "444" and clip.kind.chroma == "420":
        notices.append(
            f"{target.name}: {width} x {height} pixels are not even numbers, so it is written in 4:4:4, which some players lack."
        )
    depths = spec.depths if codec != "ffv1" else _RGB_DEPTHS if chroma == "rgb" else _YCBCR_DEPTHS
    depth = next((depth for depth in depths if depth >= clip.kind.depth), depths[-1])
    if depth < clip.kind.depth:
        better = "hevc or ffv1" if clip.kind.depth <= 12 and codec != "hevc" else "ffv1"
        notices.append(
            f"{target.name}: {codec} holds {depth} bits, the clip has {clip.kind.depth}. --codec {better} keeps them in a .mkv."
        )
    rate = min(max(clip.rate, Fraction(1)), Fraction(240))  # AV1's encoder knows no higher one
    colour = clip.colour if chroma == "rgb" else clip.colour.as_ycbcr()
    hdr = clip.hdr
    if hdr and codec == "ffv1":
        notices.append(
            f"{target.name}: ffv1 holds no data about the screen that HDR was made on; left out. --codec hevc keeps them."
        )
    if codec in ("av1", "ffv1") and target.suffix.lower() in (".mkv", ".webm"):
        notices += stretched(clip, target, f" {hevc} keeps that.")
    encoding = Encoding(
        codec,
        spec.crf if crf is None else crf,
        PixelKind(depth, chroma),
        colour,
        height,
        width,
        rate,
        clip.aspect,
        None if codec == "ffv1" else hdr,
    )
    return encoding, notices


def stretched(clip: Clip, target: Path, way_out: str = " A .mp4 keeps that.") -> list[str]:
    """What is lost of a clip's shape in a file that has no place for it, one sentence or none."""
    if clip.aspect == 1:
        return []
    what = f"pixels that are {clip.aspect} as wide as high cannot be noted"
    return [f"{target.name}: {what} in this file, which will look stretched.{way_out}"]


def _chroma(chroma: str, codec: Codec, height: int, width: int) -> str | None:
    """The chroma of the result; None if there is none for this size. The clip's, if it can be; 4:2:0 for R'G'B' and grey, which
    at the larger size still has more colour samples than the clip."""
    wanted = chroma if chroma in codec.chroma else "420"
    if not codec.even or not (width % 2 or (height % 2 and wanted == "420")) or wanted == "444":
        return wanted
    return "444" if "444" in codec.chroma else None


class PartWriter:
    """Encodes frames into a Matroska file, in which the time of a frame is its number in milliseconds.

    The true times come in when all parts are joined: Matroska would round them.
    """

    def __init__(self, path: Path, encoding: Encoding, first: int) -> None:
        """Args:
        first: the number of the first frame.
        """
        av = import_av()
        self._path, self._encoding, self._first, self._number = path, encoding, first, first
        self.order: list[int] = []  # numbers of frames in the order of their packets
        os.environ.setdefault("SVT_LOG", "1")  # SVT-AV1 prints its settings otherwise
        self._container = av.open(str(path), "w", format="matroska")
        stream = self._container.add_stream(CODECS[encoding.codec].encoder, rate=encoding.rate, options=self._options())
        stream.width, stream.height, stream.pix_fmt = encoding.width, encoding.height, encoding.kind.format
        if encoding.kind.format == "gbrp":
            stream.pix_fmt = "bgr0"
        context = stream.codec_context
        context.time_base = 1 / encoding.rate
        context.sample_aspect_ratio = encoding.aspect
        context.color_range = 2 if encoding.colour.full_range else 1
        context.colorspace = encoding.colour.matrix
        context.color_primaries, context.color_trc = encoding.colour.primaries, encoding.colour.transfer
        self._stream = stream
        try:
            self._container.start_encoding()
        except (av.error.FFmpegError, ValueError) as error:
            self.abandon()
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise
            raise VideoFileError(
                f"{encoding.codec} cannot encode {encoding.width} x {encoding.height} pixels of {encoding.kind.format} "
                f"({error}). Choose another --codec or a smaller --upscale."
            ) from error

    def _options(self) -> dict[str, str]:
        codec, crf = CODECS[self._encoding.codec], self._encoding.crf
        options = {} if crf is None else {"crf": str(crf)}
        hdr = self._encoding.hdr.parameters(codec.encoder) if self._encoding.hdr else ""
        if codec.encoder == "libx264":
            options |= {"preset": "medium", "chroma_sample_location": "left"} | ({"x264-params": hdr} if hdr else {})
        elif codec.encoder == "libx265":
            # x265 4.2 writes past the end of a table of its cutree analysis in frames of 33 to 50 columns, and the process dies.
            narrow = ":cutree=0" if self._encoding.width < 64 else ""
            options |= {"preset": "medium", "x265-params": f"log-level=none{narrow}" + (f":{hdr}" if hdr else "")}
        elif codec.encoder == "libsvtav1":
            options |= {"preset": "8", "chroma_sample_location": "left"} | ({"svtav1-params": hdr} if hdr else {})
        else:
            options |= {"level": "3", "slicecrc": "1", "g": "1"}
        return options

    def write(self, pixels: np.ndarray) -> None:
        """Encodes the next frame, (H, W, 3) in [0, 1]."""
        frame = from_rgb(pixels, self._encoding.kind, self._encoding.colour)
        if self._stream.pix_fmt == "bgr0":
            frame = frame.reformat(format="bgr0")
        frame.pts, frame.time_base = self._number, 1 / self._encoding.rate
        frame.color_range, frame.colorspace = (2 if self._encoding.colour.full_range else 1), self._encoding.colour.matrix
        self._number += 1
        self._mux(self._stream.encode(frame))

    def close(self) -> None:
        """Encodes what is still waiting, and finishes the file."""
        self._mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """Closes the file, whatever it holds."""
        try:
            self._container.close()
        except (OSError, ValueError):
            pass

    def _mux(self, packets: list) -> None:
        for packet in packets:
            # An encoder's time base may differ from ours; frame numbers are whole in it.

            number = round(packet.pts * seconds_of(packet.time_base) * self._encoding.rate)
            # Decoding times are made anew when parts are joined, and x265 leaves them undefined in clips of a few frames.
            decoded = len(self.order) + self._first - _MOST_REORDERED

            self.order.append(number)
            packet.time_base = Fraction(1, 1000)
            packet.pts, packet.dts, packet.duration = number, decoded, 1
            self._container.mux(packet)


_MOST_REORDERED = 64  # frames that an encoder may put behind later ones
