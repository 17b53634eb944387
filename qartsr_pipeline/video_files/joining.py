"""Joins the encoded parts with the sound, subtitles and chapters of the source. Nothing is encoded anew, but for GIF."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from qartsr_pipeline.video_files.clip import Clip, VideoFileError, frames_in_words, import_av, seconds_of
from qartsr_pipeline.video_files.copying import copied_streams, copy_tags, other_packets
from qartsr_pipeline.video_files.encoding import Encoding
from qartsr_pipeline.video_files.parts import Part
from qartsr_pipeline.video_files.reading import moving_pictures, opened

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer

_FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}


def join(clip: Clip, encoding: Encoding, parts: Sequence[Part], target: Path) -> list[str]:
    """Writes the result.

    Args:
        parts: in order, without gaps.
        target: an existing file is replaced; half a file may be left where this fails.

    Returns:
        What could not be taken over from the clip, one sentence each.

    Raises:
        VideoFileError: there are no frames.
        OSError: the file cannot be written.
    """
    if not parts:
        raise VideoFileError(f"{clip.path} has no frames. There is nothing to write.")
    suffix = target.suffix.lower()
    if suffix == ".gif":
        return _join_gif(clip, parts, target)
    av = import_av()
    with ExitStack() as files:
        source = None if clip.images else files.enter_context(opened(clip.path))
        options = {} if suffix in (".mkv", ".webm") else {"movflags": "+".join(_mov_flags(source))}
        first = files.enter_context(av.open(str(parts[0].path)))
        out = files.enter_context(av.open(str(target), "w", format=_FORMATS[suffix], options=options))
        template = first.streams.video[0]
        video = out.add_stream_from_template(template, opaque=True)
        video.time_base = clip.time_base
        if encoding.codec == "hevc" and suffix != ".mkv":
            video.codec_context.codec_tag = "hvc1"  # Apple's players know no other
        if encoding.aspect != 1:
            video.codec_context.sample_aspect_ratio = encoding.aspect
        streams: dict[int, Any] = {}
        notices: list[str] = []
        if source is not None:
            streams, notices = copied_streams(source, out, clip)
            copy_tags(source, out, video, clip)
        others = iter(()) if source is None else other_packets(source, streams, clip)
        waiting = next(others, None)
        for packet in _video_packets(parts, clip, bytes(template.codec_context.extradata or b"")):
            while waiting is not None and _seconds(waiting) <= _seconds(packet):
                out.mux(waiting)
                waiting = next(others, None)
            packet.stream = video
            out.mux(packet)
        while waiting is not None:
            out.mux(waiting)
            waiting = next(others, None)
        return notices


def _mov_flags(source: InputContainer | None) -> list[str]:
    """The index comes first, for the web. Tags of any name are kept, unless there is a cover picture: MP4 holds either."""
    has_cover = source is not None and len(source.streams.video) > len(moving_pictures(source))
    return ["faststart"] if has_cover else ["faststart", "use_metadata_tags"]


def _seconds(packet: Packet) -> Fraction:
    time = packet.dts if packet.dts is not None else packet.pts
    return (time or 0) * seconds_of(packet.time_base)


def _video_packets(parts: Sequence[Part], clip: Clip, header: bytes) -> Iterator[Packet]:
    """The encoded frames with their true times.

    Decoding times would overlap where two parts meet, so all are made anew: the times of all frames in order, late by as many
    frames as any frame is encoded after frames that follow it.
    """
    av = import_av()
    times = [time for part in parts for time in part.times]
    durations = [later - time for time, later in zip(times, times[1:], strict=False)]
    durations.append(parts[-1].durations[-1] or max(1, round(1 / clip.rate / clip.time_base)))
    order = [number for part in parts for number in part.order]
    if sorted(order) != list(range(len(times))):
        raise VideoFileError(f"{parts[0].path.parent} is damaged: its frames are not complete. Delete it, and run again.")
    delay = max(position - number for position, number in enumerate(order))
    position = 0
    for part in parts:
        with av.open(str(part.path)) as container:
            stream = container.streams.video[0]
            if bytes(stream.codec_context.extradata or b"") != header:
                raise VideoFileError(
                    f"{part.path.parent} holds parts of different encoders. Begin anew: --overwrite without --resume."
                )
            for packet in container.demux(stream):
                if packet.pts is None:
                    continue
                number = order[position]
                before = position - delay
                packet.time_base = clip.time_base
                packet.pts = times[number]
                packet.dts = times[before] if before >= 0 else times[0] + before * durations[0]
                packet.duration = durations[number]
                yield packet
                position += 1
    if position != len(times):
        raise VideoFileError(
            f"{parts[0].path.parent} is damaged: it lacks {frames_in_words(len(times) - position)}. Delete it, and run again."
        )


def _join_gif(clip: Clip, parts: Sequence[Part], target: Path) -> list[str]:
    """Frames with a palette of their own each, and times in hundredths of a second, rounded so that errors do not add up."""
    times = [time for part in parts for time in part.times]
    times.append(times[-1] + (parts[-1].durations[-1] or max(1, round(1 / clip.rate / clip.time_base))))
    hundredths = [round((time - times[0]) * clip.time_base * 100) for time in times]
    durations = [10 * max(1, later - time) for time, later in zip(hundredths, hundredths[1:], strict=False)]
    frames = _images(parts)
    first = next(frames)
    loop = _loop(clip)
    with open(target, "wb") as file:
        first.save(file, "GIF", save_all=True, append_images=frames, duration=durations, loop=loop, disposal=1, optimize=False)
    return []


def _loop(clip: Clip) -> int:
    """How often it is shown; 0 for without end."""
    try:
        with Image.open(clip.path) as image:
            return int(image.info.get("loop", 0))
    except (OSError, ValueError):
        return 0


def _images(parts: Sequence[Part]) -> Iterator[Image.Image]:
    av = import_av()
    for part in parts:
        with av.open(str(part.path)) as container:
            for frame in container.decode(video=0):
                array = (frame.to_ndarray(format="gbrp10le").astype("float32") * (255 / 1023)).round().astype("uint8")
                yield Image.fromarray(array).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG)
