"""Clips for tests, written with PyAV, and the shortest way from a clip to its enlargement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from qartsr_pipeline.video_files.damage import Damage
from qartsr_pipeline.video_files.reading import open_clip, read_frames
from qartsr_pipeline.video_files.writing import open_writer

GREY, RED, TEAL = (0.5, 0.5, 0.5), (0.8, 0.15, 0.1), (0.1, 0.6, 0.55)


def flat(colour: Sequence[float], height: int = 32, width: int = 48) -> np.ndarray:
    """(H, W, 3) of one colour."""
    return np.broadcast_to(np.float32(colour), (height, width, 3)).copy()


def moving(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames that differ: a bright bar moves over a gradient."""
    ramp = np.linspace(0.1, 0.7, width, dtype=np.float32)[None, :, None].repeat(height, 0).repeat(3, 2)
    frames = [ramp.copy() for _ in range(count)]
    for index, frame in enumerate(frames):
        frame[:, (index * 3) % width : (index * 3) % width + 4] = 0.95
    return frames


def ycbcr(pixels: np.ndarray, shares: tuple[float, float], full: bool, depth: int = 8) -> list[np.ndarray]:
    """Planes of 4:4:4, by the formulas of ITU-T H.273, for an independent check."""
    red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
    luma = shares[0] * red + (1 - sum(shares)) * green + shares[1] * blue
    pair = [(blue - luma) / (2 - 2 * shares[1]), (red - luma) / (2 - 2 * shares[0])]
    step = 2 ** (depth - 8)
    if full:
        planes = [luma * (2**depth - 1), *(c * (2**depth - 1) + 128 * step for c in pair)]
    else:
        planes = [(luma * 219 + 16) * step, *((c * 224 + 128) * step for c in pair)]
    return [np.clip(np.rint(plane), 0, 2**depth - 1) for plane in planes]


def fill(frame: av.VideoFrame, planes: Sequence[np.ndarray]) -> av.VideoFrame:
    """Writes planes into a frame; those of chroma are thinned to its size."""
    for plane, values in zip(frame.planes, planes, strict=True):
        dtype = np.dtype(np.uint8 if plane.line_size < 2 * plane.width or "le" not in frame.format.name else "<u2")
        rows = np.zeros((plane.height, plane.line_size // dtype.itemsize), dtype)
        rows[:, : plane.width] = values[:: values.shape[0] // plane.height, :: values.shape[1] // plane.width][
            : plane.height, : plane.width
        ]
        plane.update(rows.tobytes() + bytes(plane.buffer_size - rows.nbytes))
    return frame


def make_clip(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    format: str = "yuv444p",
    times: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 25),
    tags: tuple[int, int, int] = (1, 1, 1),
    shares: tuple[float, float] = (0.2126, 0.0722),
    full: bool = False,
    tag_range: bool = True,
    options: dict[str, str] | None = None,
    setup: Callable[[object], None] = lambda stream: None,
    start: int = 0,
    audio: str | None = None,
    packets: Callable[[av.container.OutputContainer], Iterator[av.Packet]] | None = None,
    container_format: str | None = None,
) -> Path:
    """Writes a clip.

    Args:
        times: of the frames, in `time_base`.
        start: when the clip begins, in seconds.
        tags: matrix, primaries, transfer.
        audio: codec of half a second of silence with a click, or "empty" for a stream without packets.
        packets: adds streams, and yields their packets.
    """
    depth = max(component.bits for component in av.VideoFormat(format, 16, 16).components)
    with av.open(str(path), "w", format=container_format) as out:
        stream = out.add_stream(
            codec, rate=25, options={"crf": "4"} | (options or {}) if codec.startswith("libx") else options or {}
        )
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = format
        context = stream.codec_context
        context.time_base = time_base
        context.colorspace, context.color_primaries, context.color_trc = tags
        if tag_range:
            context.color_range = 2 if full else 1
        setup(stream)
        sound = None
        if audio:
            sound = out.add_stream("aac" if audio == "empty" else audio, rate=48000)
        more = packets(out) if packets else iter(())
        first = next(more, None)
        for index, pixels in enumerate(frames):
            if format in ("rgb8", "bgr0", "gbrp", "pal8"):
                frame = av.VideoFrame.from_ndarray(np.rint(pixels * 255).astype(np.uint8), "rgb24").reformat(format=format)
            else:
                frame = fill(
                    av.VideoFrame(stream.width, stream.height, format),
                    ycbcr(pixels, shares, full, depth)[: 1 if "gray" in format else 3],
                )
            frame.pts, frame.time_base = (times[index] if times else index) + round(start / time_base), time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None and audio != "empty":
            samples = np.zeros((2, 24000), np.float32)
            samples[:, 12000:12010] = 0.9
            name = "flt" if audio == "libopus" else sound.codec_context.format.name
            if name == "flt":
                block = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1).copy(), format="flt", layout="stereo")
            elif name == "s16":
                block = av.AudioFrame.from_ndarray(
                    (samples.T.reshape(1, -1) * 32767).astype(np.int16), format="s16", layout="stereo"
                )
            else:
                block = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            block.sample_rate, block.pts = 48000, 48000 * start
            out.mux(sound.encode(block))
            out.mux(sound.encode(None))
        for packet in [] if first is None else [first, *more]:
            out.mux(packet)
    return path


def enlarge(source: Path, target: Path, factor: int = 2, **options: object) -> list[str]:
    """Every frame with each pixel repeated: what `qartsr upscale` does with a clip, without a network. Returns all notices."""
    deinterlace = bool(options.pop("deinterlace", False))
    clip = open_clip(source, options.pop("fps", None))
    size = (clip.height * factor, clip.width * factor)
    writer, notices = open_writer(clip, target, size, **options)
    damage = Damage()
    for frame in read_frames(clip, writer.done, deinterlace, damage):
        writer.write(frame.pixels.repeat(factor, 0).repeat(factor, 1), frame.time, frame.duration)
    return [*clip.notices, *notices, *writer.finish(), *damage.notices(clip)]


def frames_of(path: Path) -> list[tuple[Fraction, np.ndarray]]:
    """(seconds, pixels) of every frame, as this package reads them."""
    clip = open_clip(path)
    return [(frame.time * clip.time_base, frame.pixels) for frame in read_frames(clip)]


def audio_bytes(path: Path) -> list[tuple[Fraction, bytes]]:
    """(seconds, content) of every packet of sound."""
    with av.open(str(path)) as container:
        return [(p.pts * p.time_base, bytes(p)) for p in container.demux(audio=0) if p.pts is not None]
