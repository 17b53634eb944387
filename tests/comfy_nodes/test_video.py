"""Clips and frames through the nodes' functions, with models for clips and for images."""

from __future__ import annotations

import io
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("av", reason="clips need PyAV: pip install 'qartsr[video]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "video_files"))

from clips import audio_bytes, frames_of, make_clip, moving  # noqa: E402
from comfy_classes import InterruptProcessingException, VideoFromFile  # noqa: E402

from qartsr_pipeline.checkpoint_files import label_of, shipped_checkpoints  # noqa: E402
from tiny_models import build_tiny_video_pipeline  # noqa: E402

DEFAULTS = {"scale": 4.0, "tile_size": 0, "frames_per_chunk": 0, "chunk_overlap": -1, "keep_colors": True}
FILE = DEFAULTS | {"deinterlace": False, "codec": "auto", "crf": -1}
LOADING = {"hub_id": "", "backend": "auto", "dtype": "auto"}


@pytest.fixture
def video_folder(comfy):
    import folder_paths

    folder = Path(folder_paths.models_dir) / "qartsr" / "clips"
    build_tiny_video_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def video_model(nodes, video_folder):
    return nodes["QArtSRLoadVideoModel"].execute("clips", **LOADING).args[0]


@pytest.fixture
def clip(tmp_path):
    return make_clip(tmp_path / "clip.mp4", moving(7, 16, 16), times=[0, 1, 2, 5, 6, 9, 10], audio="aac", format="yuv420p")


def test_a_clip_becomes_a_file_with_everything_it_had(nodes, comfy, video_model, clip, tmp_path):
    output = nodes["QArtSRVideoUpscale"].execute(video_model, VideoFromFile(str(clip)), **FILE)
    result = Path(output.args[0].get_stream_source())
    before, after = frames_of(clip), frames_of(result)
    assert [time for time, _ in after] == [time for time, _ in before] and after[0][1].shape == (64, 64, 3)
    assert audio_bytes(result) == audio_bytes(clip) and result.is_relative_to(tmp_path / "temp")
    expected = list(build_tiny_video_pipeline().stream([pixels for _, pixels in before]))
    luma = np.float32([0.2126, 0.7152, 0.0722])
    assert max(np.abs((found - same) @ luma).mean() for (_, found), same in zip(after, expected, strict=True)) < 0.02
    (text,) = output.ui["text"]
    assert text.startswith("7 frames, 64 x 64 from 16 x 16, ") and "full precision" in text and "\n" not in text
    assert [value for value, _, _ in comfy.progress] == list(range(1, 8))
    assert comfy.progress[-1][2][1].size == (64, 64)
    assert [path.name for path in result.parent.iterdir()] == ["enlarged.mp4"]


def test_an_image_model_enlarges_frame_by_frame_and_says_so(nodes, model, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", moving(2, 16, 16), format="yuv420p")
    output = nodes["QArtSRVideoUpscale"].execute(model, VideoFromFile(str(clip)), **FILE | {"scale": 2.0, "codec": "hevc"})
    after = frames_of(output.args[0].get_stream_source())
    assert len(after) == 2 and after[0][1].shape == (32, 32, 3)
    assert "tiny is a model for images: frames were enlarged one by one" in output.ui["text"][0]


def test_clips_that_are_no_files_are_read_without_loss(nodes, model, clip, monkeypatch):
    """A clip in memory, frames that another node has made, and the beginning of a clip."""

    def repeated(self, frames, *, upscale):
        yield from (frame.repeat(4, 0).repeat(4, 1) for frame in frames)

    monkeypatch.setattr("qartsr_pipeline.cli.upscale_clips.FrameByFrame.stream", repeated)
    run = nodes["QArtSRVideoUpscale"]
    in_memory = frames_of(run.execute(model, VideoFromFile(io.BytesIO(clip.read_bytes())), **FILE).args[0].get_stream_source())
    assert [time for time, _ in in_memory] == [time for time, _ in frames_of(clip)]
    images = torch.from_numpy(np.stack([np.round(frame * 255) / 255 for frame in moving(5, 16, 16)]))
    sound = {"waveform": torch.sin(torch.arange(4800) / 20).expand(1, 2, -1), "sample_rate": 24000}
    made = SimpleNamespace(get_components=lambda: SimpleNamespace(images=images, audio=sound, frame_rate=Fraction(30000, 1001)))
    result = run.execute(model, made, **FILE).args[0].get_stream_source()
    assert [time for time, _ in frames_of(result)] == [number * Fraction(1001, 30000) for number in range(5)]
    assert audio_bytes(result)
    part = VideoFromFile(str(clip), duration=0.2)
    assert 2 <= len(frames_of(run.execute(model, part, **FILE).args[0].get_stream_source())) < 7


def test_a_copy_has_the_pixels_that_were_given(comfy, tmp_path):
    from comfy_nodes.video_source import write_lossless

    images = torch.randint(0, 256, (3, 18, 22, 3)) / 255
    path = write_lossless(SimpleNamespace(images=images, audio=None, frame_rate=Fraction(24)), tmp_path / "a.mov")
    found = np.stack([pixels for _, pixels in frames_of(path)])
    assert np.abs(found - images.numpy()).max() < 1e-6


@pytest.mark.parametrize("kind", ["clips", "images"])
def test_frames_of_a_graph(nodes, comfy, video_model, model, kind):
    chosen = video_model if kind == "clips" else model
    count = 7 if kind == "clips" else 2
    images = torch.from_numpy(np.stack(moving(count, 16, 20)))
    output = nodes["QArtSRVideoFrames"].execute(chosen, images, **DEFAULTS | {"scale": 3.0})
    if kind == "clips":
        expected = np.stack(list(build_tiny_video_pipeline().stream(list(images.numpy()), upscale=3.0)))
    else:
        expected = np.stack([model.pipeline(frame, upscale=3.0, output_type="np").images[0] for frame in images.numpy()])
    assert output.args[0].shape == (count, 48, 60, 3) and np.abs(output.args[0].numpy() - expected).max() < 1e-4
    assert ("is a model for images" in output.ui["text"][0]) == (kind == "images")
    assert [value for value, _, _ in comfy.progress] == list(range(1, count + 1))


@pytest.mark.parametrize("cancel", ["cancel_at", "cancel_at_step"])
def test_a_cancel_leaves_nothing(nodes, comfy, video_model, clip, tmp_path, cancel):
    setattr(comfy, cancel, 5)
    with pytest.raises(InterruptProcessingException):
        nodes["QArtSRVideoUpscale"].execute(video_model, VideoFromFile(str(clip)), **FILE)
    assert list((tmp_path / "temp").iterdir()) == []


def test_models_for_clips_come_first_and_are_no_models_for_images(nodes, video_folder):
    listed = nodes["QArtSRLoadVideoModel"].define_schema().inputs[0]
    assert listed.options[0] == listed.default == "clips" and "photo-w4a4" in listed.options
    labels = listed.extra_dict["qartsr_labels"]
    assert labels["clips"].startswith("for clips, full precision")
    assert labels["tiny-fp"].startswith("for images, frame by frame, clean images")
    load = nodes["QArtSRLoadModel"]
    assert "clips" not in load.define_schema().inputs[0].options
    assert "clips is a model for clips" in load.validate_inputs(model="clips")
    with pytest.raises(ValueError, match="Load it with QArtSR Load Video Model"):
        load.execute("clips", **LOADING)


def test_bad_clips_and_frames(nodes, model, video_model, tmp_path, monkeypatch):
    upscale, frames = nodes["QArtSRVideoUpscale"], nodes["QArtSRVideoFrames"]
    images = torch.rand(2, 16, 16, 3)
    clear, broken = images.clone(), torch.cat([images, torch.full((2, 16, 16, 1), 0.5)], dim=-1)
    clear[1, 3, 3] = torch.nan

    def made(images):
        return SimpleNamespace(get_components=lambda: SimpleNamespace(images=images, audio=None, frame_rate=Fraction(24)))

    for node, given, options, said in (
        (upscale, made(images[:0]), {}, "the video has no frames"),
        (upscale, made(clear), {}, "frame 1 of the video has pixels that are no numbers"),
        (upscale, made(images), {"codec": "ffv1"}, "codec 'ffv1' is none of auto, h264"),
        (upscale, made(images), {"crf": 60}, "goes from 0 .best. to 51"),
        (upscale, made(images), {"frames_per_chunk": 4, "chunk_overlap": 3}, "`chunk_overlap` must be at most half"),
        (frames, broken, {}, "partly transparent. Enlarge them with QArtSR Upscale"),
        (frames, clear, {}, "NaN"),
        (frames, images, {"tile_size": 8}, "`tile_size` must be at least"),
    ):
        with pytest.raises(ValueError, match=said):
            node.execute(video_model, given, **(FILE if node is upscale else DEFAULTS) | options)
    monkeypatch.setattr("comfy_nodes.video_run.problem_of", lambda name, bound: f"{name} 14.2.0 is older than {bound}")
    with pytest.raises(ImportError, match="av 14.2.0 is older than 17.0.0, which QArtSR needs for clips. Run: pip install"):
        upscale.execute(model, made(images), **FILE)
    assert list((tmp_path / "temp").iterdir()) == []


def test_memory_that_runs_out(nodes, video_model, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(type(video_model.pipeline.transformer), "forward", full)
    with pytest.raises(MemoryError, match="memory ran out on cpu. Choose a smaller tile_size, such as "):
        nodes["QArtSRVideoFrames"].execute(video_model, torch.rand(2, 16, 16, 3), **DEFAULTS)


def test_model_info_of_a_quantized_model_for_clips(nodes):
    model = nodes["QArtSRLoadVideoModel"].execute("video-w4a4", **LOADING | {"backend": "reference"}).args[0]
    model.seconds_per_megapixel = 0.25  # otherwise measured
    text = nodes["QArtSRModelInfo"].execute(model=model).args[0]
    first, _, *lines = text.splitlines()
    label = label_of(shipped_checkpoints()["video-w4a4"])
    assert first.startswith(f"video-w4a4: {label}, x4, on the CPU, about 0.25 s for a megapixel of each frame of the result")
    assert lines[0].startswith("timestep 400; chunks of 5 frames in tiles of 96; ")
    parts = [line for line in lines if not line.startswith("  ")]
    assert parts[1].startswith("transformer: W4A4 per token x ") and ", folded at T = 400, " in parts[1]
    assert parts[2].startswith("vae: W8A8 x ") and parts[-1] == "running on: cpu, float32, kernels reference"
    assert any(line.startswith("  linear W4A4 x ") and line.endswith(": reference") for line in lines)
