"""What is copied from a clip into its enlargement: sound, subtitles, cover pictures, fonts, chapters and tags."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from qartsr_pipeline.video_files.clip import Clip, import_av, seconds_of
from qartsr_pipeline.video_files.reading import moving_pictures, opened

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer, OutputContainer

# What a container writes about itself, and what describes the small frames.
_OWN_TAGS = {
    "major_brand",
    "minor_version",
    "compatible_brands",
    "encoder",
    "duration",
    "number_of_frames",
    "number_of_bytes",
    "bps",
}


def copied_streams(source: InputContainer, out: OutputContainer, clip: Clip) -> tuple[dict[int, Any], list[str]]:
    """Adds the streams beside the video; returns them by their number in the source, and what the new file cannot hold."""
    copied: dict[int, Any] = {}
    lost: list[str] = []
    supported = out.supported_codecs
    videos = {stream.index for stream in moving_pictures(source)}
    stream: Any
    for stream in source.streams:
        if stream.index in videos:
            continue
        added = None
        if out.format.name == "matroska" and stream.type in ("attachment", "video"):
            _attach(stream, out, clip)
        elif _codec_names(stream) & supported and not (stream.type == "video" and out.format.name == "webm"):
            added = out.add_stream_from_template(stream, opaque=True)
        else:
            lost.append(_called(stream))
        if added is not None:
            added.metadata.update(_tags(stream.metadata))
            added.disposition = stream.disposition
            copied[stream.index] = added
    if not lost:
        return copied, []
    way = "" if out.format.name == "matroska" else " Write a .mkv to keep more."
    return copied, [f"{clip.path.name}: left out, because the new file cannot hold it: {'; '.join(lost)}.{way}"]


def _codec_names(stream: Any) -> set[str]:
    """FFmpeg's names of a codec; none for streams that are not copied."""
    if stream.codec_context is None or stream.type not in ("audio", "subtitle", "video"):
        return set()
    codec = stream.codec_context.codec
    return {codec.name, codec.canonical_name}


def _called(stream: Any) -> str:
    """What a message calls a stream."""
    facts = [stream.codec_context.codec.canonical_name if stream.codec_context else None, stream.metadata.get("language")]
    what = "cover picture" if stream.type == "video" else stream.type
    return f"{what} ({', '.join(filter(None, facts)) or 'of unknown kind'})"


def _attach(stream: Any, out: Any, clip: Clip) -> None:
    """Matroska holds cover pictures and fonts as files."""
    if stream.type == "attachment":
        name, kind, content = stream.metadata.get("filename", "attachment"), stream.mimetype, bytes(stream.data)
    else:
        codec = stream.codec_context.codec.canonical_name
        name, kind = ("cover.png", "image/png") if codec == "png" else ("cover.jpg", "image/jpeg")
        with opened(clip.path) as source:
            packets = source.demux(source.streams[stream.index])
            content = next((bytes(packet) for packet in packets if packet.size), b"")
    out.add_attachment(name, kind or "application/octet-stream", content)


def copy_tags(source: InputContainer, out: OutputContainer, video: Any, clip: Clip) -> None:
    """Titles, dates, languages and chapters."""
    out.metadata.update(_tags(source.metadata))
    original = moving_pictures(source)[0]
    video.metadata.update(_tags(original.metadata))
    video.disposition = original.disposition
    chapters = source.chapters()
    for chapter in chapters:
        base = chapter["time_base"] or Fraction(1, 1000)
        shift = round(clip.origin * clip.time_base / seconds_of(base))
        chapter["start"], chapter["end"] = chapter["start"] - shift, chapter["end"] - shift
    if chapters:
        out.set_chapters(chapters)


def _tags(metadata: dict[str, str]) -> dict[str, str]:
    return {
        key: value for key, value in metadata.items() if key.lower().split("-")[0] not in _OWN_TAGS and not key.startswith("_")
    }


def other_packets(source: InputContainer, streams: dict[int, Any], clip: Clip) -> Iterator[Packet]:
    """Packets of the copied streams in the order of the file, as far as it can be read."""
    if not streams:
        return
    error_of_av = import_av().error.FFmpegError
    packets = source.demux([stream for stream in source.streams if stream.index in streams])
    while True:
        try:
            packet = next(packets, None)
        except error_of_av:  # was said when the frames were read
            return
        if packet is None:
            return
        if packet.size == 0:  # the end of a stream
            continue
        added = streams[packet.stream_index]
        if added.type == "video":  # a cover picture, which has no time
            packet.pts = packet.dts = 0
        if packet.dts is None and packet.pts is None:
            continue
        shift = round(clip.origin * clip.time_base / seconds_of(packet.time_base))
        if shift:
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = added
        yield packet
