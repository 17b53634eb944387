"""The file of a VIDEO connection: the one that it was loaded from, or a lossless copy of what another node has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LONGER = 0.01  # seconds by which a file must last longer than the clip, if only a part of it is wanted
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}  # of sound, by its channels


def source_file(video: Any, folder: Path) -> Path:
    """The file that `video_files` reads.

    A clip that is loaded from a file is read from there, so that frame times, bits, colours, sound and subtitles are kept.

    Args:
        video: a `VideoInput` of ComfyUI's.
        folder: for a copy, where one is needed.

    Raises:
        ValueError: the clip has no frames, or they cannot be stored.
    """
    from comfy_api.latest import InputImpl

    if isinstance(video, InputImpl.VideoFromFile):
        file = video.get_stream_source()
        try:
            whole = video.get_duration() > InputImpl.VideoFromFile(file).get_duration() - LONGER
        except ValueError:  # the file does not say how long it is
            whole = False
        if whole:
            if isinstance(file, str):
                return Path(file)
            copy = folder / "source"
            copy.write_bytes(file.getbuffer())
            return copy
    return write_lossless(video.get_components(), folder / "source.mov")


def write_lossless(components: Any, path: Path) -> Path:
    """Writes frames with 8 bits a channel in H.264 of R'G'B', without loss, and the sound in AAC, as ComfyUI's own files have it.

    Args:
        components: a `VideoComponents` of ComfyUI's: `images` (F, H, W, C) in [0, 1], `audio` or None, `frame_rate`.
    """
    from qartsr_pipeline.video_files import import_av

    av = import_av()
    images = components.images
    if not len(images) or 0 in images.shape:
        raise ValueError("the video has no frames.")
    with av.open(str(path), "w", format="mov") as out:  # whose times are exact, also of sound that begins before the frames
        stream: Any = out.add_stream("libx264rgb", rate=components.frame_rate, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = images.shape[2], images.shape[1], "rgb24"
        sound, samples = _sound(out, components.audio)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(_eight_bits(image, number), format="rgb24")
            frame.pts, frame.time_base = number, 1 / components.frame_rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if samples is not None:
            out.mux(sound.encode(samples))
            out.mux(sound.encode(None))
    return path


def _eight_bits(image: torch.Tensor, number: int) -> Any:
    """(H, W, C) in [0, 1] -> (H, W, 3) uint8; a fourth channel is left out, as ComfyUI does when it saves a video."""
    if not bool(torch.isfinite(image).all()):
        raise ValueError(f"frame {number} of the video has pixels that are no numbers (NaN). Look at the node that made it.")
    colours = image[..., :3].expand(*image.shape[:2], 3)
    return (colours.float().clamp(0, 1) * 255).round().to("cpu", torch.uint8).contiguous().numpy()


def _sound(out: Any, audio: Any) -> tuple[Any, Any]:
    """A stream for the sound and all of its samples; (None, None) where there are none."""
    from qartsr_pipeline.video_files import import_av

    if not audio or not audio["waveform"].numel():
        return None, None
    waveform = audio["waveform"][0].float().cpu().contiguous()  # (channels, samples)
    layout, rate = LAYOUTS.get(len(waveform)), int(audio["sample_rate"])
    if layout is None:
        raise ValueError(f"the video's sound has {len(waveform)} channels; expected {', '.join(map(str, LAYOUTS))}.")
    stream = out.add_stream("aac", rate=rate, layout=layout)
    samples = import_av().AudioFrame.from_ndarray(waveform.numpy(), format="fltp", layout=layout)
    samples.sample_rate, samples.pts = rate, 0
    return stream, samples
