"""Reading clips: what the file says about itself, and its frames one after the other. Memory does not grow with the clip."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qartsr_pipeline.video_files import image_sequence
from qartsr_pipeline.video_files.clip import Clip, Frame, Turn, VideoFileError, import_av, ratio, seconds_of
from qartsr_pipeline.video_files.colour import RGB, Colour, HdrMetadata
from qartsr_pipeline.video_files.damage import Damage
from qartsr_pipeline.video_files.pixels import UnreadablePixels, kind_of, to_rgb

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_PROBED = 8  # frames in which fields are looked for


def open_clip(path: str | os.PathLike, fps: float | Fraction | None = None) -> Clip:
    """Looks at a clip.

    Args:
        path: a file, or an image sequence such as `frames/%05d.png`.
        fps: frames a second of an image sequence; None for 25.

    Raises:
        VideoFileError: no such file, no video, damaged so that nothing can be read, no frames, pixels or colours that are not
            supported, PyAV missing.
    """
    path = Path(path)
    if image_sequence.is_pattern(path):
        return image_sequence.open_sequence(path, fps)
    if fps is not None:
        raise VideoFileError(f"{path} has frame times of its own, which are kept. Leave out --fps; it is for image sequences.")
    with opened(path) as container:
        stream = video_stream(container, path)
        try:
            frames = list(islice(_decoded(container, stream, Damage()), _PROBED))
        except UnreadablePixels as error:
            raise VideoFileError(f"{path} {error}.") from error
        if not frames:
            raise VideoFileError(
                f"{path} has no frames that can be decoded. It may be empty or damaged; copy or download it again."
            )
        return _described(path, container, stream, frames)


def opened(path: Path) -> InputContainer:
    """The file, opened by FFmpeg.

    Raises:
        VideoFileError: with the reason.
    """
    av = import_av()
    if path.is_dir():
        raise VideoFileError(
            f"{path} is a folder, not a clip. For a folder of frames give their pattern, such as {path}/%05d.png."
        )
    if path.exists() and not path.is_file():
        raise VideoFileError(f"{path} is a pipe or a device, not a file. Save the clip to a file first.")
    try:
        if path.stat().st_size == 0:
            raise VideoFileError(f"{path} is empty. Copy or download it again.")
        try:
            return av.open(str(path), metadata_errors="replace")
        except TypeError:  # PyAV 19 reads tags of any encoding
            return av.open(str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoFileError(f"There is no file {path}. Check the name and the folder you are in ({Path.cwd()}).") from error
    except PermissionError as error:
        raise VideoFileError(f"{path} may not be read: permission denied. Change its permissions, or copy it.") from error
    except av.error.FFmpegError as error:
        raise VideoFileError(
            f"{path} is no video, or its beginning or index is missing ({error.strerror}). Copy or download it again."
        ) from error


def video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The stream that is enlarged: the first that is no cover picture."""
    av = import_av()
    videos = moving_pictures(container)
    if not videos:
        kinds = sorted({stream.type for stream in container.streams})
        raise VideoFileError(f"{path} holds no video, only {', '.join(kinds) or 'nothing'}. Give a file with frames.")
    stream = videos[0]
    if stream.codec_context is None or not isinstance(stream, av.video.stream.VideoStream):
        raise VideoFileError(
            f"{path} has a video codec that this PyAV ({av.__version__}) does not decode. Convert the file first."
        )
    stream.thread_type = "AUTO"
    return stream


def moving_pictures(container: InputContainer) -> list[Any]:
    """Its video streams, without cover pictures."""
    cover = import_av().stream.Disposition.attached_pic
    return [stream for stream in container.streams.video if not stream.disposition & cover]


def _described(path: Path, container: InputContainer, stream: VideoStream, frames: list[VideoFrame]) -> Clip:
    frame = frames[0]
    notices = []
    try:
        kind = kind_of(frame.format.name)
    except UnreadablePixels as error:
        raise VideoFileError(f"{path} {error}.") from error
    colour = colour_of(stream, frame)
    if kind.chroma == "rgb":
        colour = Colour(RGB, True, colour.primaries, colour.transfer)
    elif kind.chroma == "grey":
        colour = Colour(colour.matrix if colour.matrix != RGB else 2, frame.color_range != 1, colour.primaries, colour.transfer)
    colour = colour.specified(frame.height, frame.width)
    if colour.refusal:
        raise VideoFileError(f"{path}: {colour.refusal}. Convert it to BT.709 or BT.2020 first.")
    held: Any = frame.side_data
    side = {one.type.name: bytes(one) for one in held}
    turn, aspect = Turn(), ratio(stream.sample_aspect_ratio) or Fraction(1)
    if "DISPLAYMATRIX" in side:
        try:
            turn = Turn.of_matrix(np.frombuffer(side["DISPLAYMATRIX"], np.int32).reshape(3, 3))
        except ValueError as error:
            notices.append(f"{path.name}: {error}; that is left out.")
    height, width = (frame.width, frame.height) if turn.transpose else (frame.height, frame.width)
    hdr = (
        HdrMetadata.of_side_data(side.get("MASTERING_DISPLAY_METADATA"), side.get("CONTENT_LIGHT_LEVEL"))
        if colour.is_hdr
        else None
    )
    lost = [name for key, name in _LOST.items() if key in side]
    if lost:
        notices.append(f"{path.name}: left out, because it is made for the small frames: {', '.join(lost)}.")
    others = len(moving_pictures(container)) - 1
    if others > 0:
        notices.append(f"{path.name} has {others + 1} videos; only the first is enlarged and kept.")
    if kind.alpha:
        notices.append(f"{path.name}: transparent parts are laid over white.")
    rate = ratio(stream.average_rate) or ratio(stream.guessed_rate) or Fraction(25)
    count, is_exact = _count(container, stream, rate)
    time_base = ratio(stream.time_base) or Fraction(1, 90000)
    lasts = container.duration / 1_000_000 if container.duration and len(container.streams) == 1 else None
    if container.format.name == "avi" and stream.frames:  # it counts places, in some of which the frame before stays
        is_exact, lasts = False, float(stream.frames * time_base)
    begins_anywhere = bool(container.format.flags & 0x0200) and (container.start_time or 0) > 0  # AVFMT_TS_DISCONT
    return Clip(
        path,
        height,
        width,
        count,
        rate.limit_denominator(100_000),
        time_base,
        kind,
        colour,
        1 / aspect if turn.transpose else aspect,
        turn,
        lasts,
        any(one.interlaced_frame for one in frames),
        hdr,
        round(Fraction(container.start_time, 1_000_000) / time_base) if begins_anywhere else 0,
        is_exact,
        notices=tuple(notices),
    )


_LOST = {
    "DOVI_METADATA": "Dolby Vision",
    "DOVI_RPU_BUFFER": "Dolby Vision",
    "DYNAMIC_HDR_PLUS": "HDR10+",
    "DYNAMIC_HDR_VIVID": "HDR Vivid",
    "A53_CC": "closed captions within the frames",
    "STEREO3D": "how two views lie in one frame (3D)",
    "SPHERICAL": "how frames lie on a sphere (360 degrees)",
}


def colour_of(stream: VideoStream, frame: VideoFrame) -> Colour:
    """What the file says about its colours."""
    context = stream.codec_context
    full = int(frame.color_range) == 2 or frame.format.name.startswith("yuvj")
    return Colour(int(frame.colorspace), full, int(context.color_primaries), int(context.color_trc))


def _count(container: InputContainer, stream: VideoStream, rate: Fraction) -> tuple[int | None, bool]:
    """How many frames there are, and whether the file says so itself."""
    if stream.frames:
        return stream.frames, True
    time_base = ratio(stream.time_base)
    if stream.duration and time_base:
        return max(1, round(stream.duration * time_base * rate)), False
    if container.duration:
        return max(1, round(Fraction(container.duration, 1_000_000) * rate)), False
    return None, False


def read_frames(
    clip: Clip,
    start: int = 0,
    deinterlace: bool = False,
    damage: Damage | None = None,
    wanted: Callable[[int], bool] | None = None,
) -> Iterator[Frame]:
    """The frames of a clip in the order in which they are shown, each exactly once.

    Args:
        start: the first frame that is wanted; those before it are decoded, but not converted.
        deinterlace: make one frame of the two moments in each.
        damage: is told what was wrong with the file.
        wanted: whether a frame of this number is; the others are decoded, but not converted. None for all.

    Raises:
        VideoFileError: frames of different sizes.
    """
    damage = Damage() if damage is None else damage
    if clip.images:
        damage.read = min(start, len(clip.images))  # also where nothing is left to read
        for damage.read, numbered in enumerate(image_sequence.read_sequence(clip, start), start + 1):
            if wanted is None or wanted(damage.read - 1):
                yield numbered
        return
    with opened(clip.path) as container:
        stream = video_stream(container, clip.path)
        frames = _decoded(container, stream, damage)
        if deinterlace:
            frames = _deinterlaced(frames, clip)
        last = None
        stored = (clip.width, clip.height) if clip.turn.transpose else (clip.height, clip.width)
        for index, frame in enumerate(frames):
            if (frame.height, frame.width) != stored:
                raise VideoFileError(
                    f"{clip.path} changes from {stored[1]} x {stored[0]} to {frame.width} x {frame.height} pixels "
                    f"at frame {index}. All frames of a clip must have one size: cut it there, and enlarge the parts."
                )
            time = _time(frame, clip)
            length = round((frame.duration or 0) * seconds_of(frame.time_base) / clip.time_base)
            if time is None or (last is not None and time <= last):
                damage.moved += time is not None or last is not None
                step = max(1, round(1 / clip.rate / clip.time_base)) if time is None else 1
                time = 0 if last is None else last + step
            last = time
            damage.read, damage.last = index + 1, float(time * clip.time_base)
            damage.until = float((time + length) * clip.time_base)
            damage.interlaced += frame.interlaced_frame
            if frame.is_corrupt:
                damage.frames += 1
                damage.at()
            if index >= start and (wanted is None or wanted(index)):
                yield Frame(clip.turn.apply(to_rgb(frame, clip.colour)), time, length)


def _time(frame: VideoFrame, clip: Clip) -> int | None:
    if frame.pts is None:
        return None
    return round(frame.pts * seconds_of(frame.time_base) / clip.time_base) - clip.origin


def _decoded(container: InputContainer, stream: VideoStream, damage: Damage) -> Iterator[VideoFrame]:
    """The stream's frames; what cannot be decoded is left out and noted."""
    error_of_av = import_av().error.FFmpegError
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except error_of_av as error:
            damage.end = error.strerror or type(error).__name__
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except EOFError:
            return
        except error_of_av:
            damage.packets += 1
            damage.at()
            continue
        if packet.is_corrupt and not any(frame.is_corrupt for frame in frames):
            damage.packets += 1
            damage.at()
        yield from frames


def _deinterlaced(frames: Iterator[VideoFrame], clip: Clip) -> Iterator[VideoFrame]:
    """One frame of each, by FFmpeg's bwdif. What it tells about colours is the same as before."""
    av = import_av()
    graph = None
    for frame in frames:
        if graph is None:
            graph = av.filter.Graph()
            base = seconds_of(frame.time_base)
            buffer = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)
            graph.link_nodes(buffer, graph.add("bwdif", "mode=send_frame:deint=all"), graph.add("buffersink")).configure()
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


def _pulled(graph: Any) -> Iterator[VideoFrame]:
    av = import_av()
    while True:
        try:
            yield graph.vpull()
        except (av.error.BlockingIOError, EOFError):
            return
