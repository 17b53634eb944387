"""The video pipeline on tiny random models: count and size, streaming, chunks and tiles, saving, bad input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from group_offload import needs_group_offload

from qartsr_pipeline import CheckpointError, LSGQuantVideoPipeline, QArtSRPipeline
from qartsr_pipeline.memory import NotEnoughMemory
from qartsr_pipeline.overflow import compute_dtype
from qartsr_pipeline.video_files import VideoFileError
from tiny_models import build_tiny_video_pipeline


@pytest.fixture(scope="module")
def pipeline():
    """Chunks of 5 frames, tiles of 64 pixels; not to be changed."""
    return build_tiny_video_pipeline()


def clip(frames: int, height: int = 16, width: int = 20, seed: int = 0) -> np.ndarray:
    """Smooth shapes that drift, (F, H, W, 3) float32 in [0, 1]."""
    phase = np.random.default_rng(seed).random(3) * 6
    rows, columns = np.mgrid[:height, :width]
    moved = [np.sin((rows * 0.3 + columns * 0.2 + time * 0.1)[..., None] + phase) for time in range(frames)]
    return (0.5 + 0.3 * np.stack(moved)).astype(np.float32)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (2, 16, 21), (5, 17, 16), (7, 23, 19), (12, 1, 3)])
def test_as_many_frames_come_out_as_went_in_and_their_size_is_exact(temporal, frames, height, width):
    made = build_tiny_video_pipeline(temporal=temporal)(clip(frames, height, width), output_type="np").frames
    assert made.shape == (1, frames, 4 * height, 4 * width, 3) and made.dtype == np.float32
    assert np.isfinite(made).all() and made.min() >= 0 and made.max() <= 1


def test_the_enlargement_need_not_be_the_models(pipeline):
    assert pipeline(clip(2, 10, 11), upscale=2.5, output_type="pt").frames.shape == (1, 2, 3, 25, 28)


@pytest.mark.parametrize("temporal", [False, True])
def test_the_stream_gives_the_same_frames_as_the_call(temporal):
    pipeline, video = build_tiny_video_pipeline(temporal=temporal), clip(12)
    streamed = np.stack(list(pipeline.stream(iter(video))))
    assert np.array_equal(streamed, pipeline(video, output_type="np").frames[0])
    assert np.array_equal(streamed, pipeline(video, output_type="np").frames[0])  # and twice the same


def test_kinds_of_input_and_output_agree(pipeline):
    video = (clip(3) * 255).round().astype(np.uint8)
    made = pipeline(video, output_type="np").frames[0]
    same = (
        torch.from_numpy(video).permute(0, 3, 1, 2),
        [PIL.Image.fromarray(frame) for frame in video],
        list(video),
        video.astype(np.float32) / 255,
        (video.astype(np.uint16) * 257),
    )
    for other in same:
        assert np.allclose(pipeline(other, output_type="np").frames[0], made, atol=1e-5)
    images = pipeline(video, return_dict=False)[0]
    assert len(images) == 1 and [image.size for image in images[0]] == [(80, 64)] * 3
    assert np.abs(np.asarray(images[0][2]) - made[2] * 255).max() <= 0.5001
    assert np.array_equal(pipeline(video, output_type="pt").frames.permute(0, 1, 3, 4, 2).numpy()[0], made)


def test_a_frame_without_colour_stays_without(pipeline):
    video = clip(4)
    video[1:] = video[1:, ..., :1]
    made = pipeline(video, output_type="np").frames[0]
    spread = (made.max(-1) - made.min(-1)).max((1, 2))
    assert spread[0] > 0.01 and (spread[1:] == 0).all()


def test_one_frame_is_not_taken_apart_into_rows(pipeline):
    frame = clip(1)[0]
    for one in (frame, torch.from_numpy(frame).permute(2, 0, 1), frame[..., 0]):
        with pytest.raises(ValueError, match="`frames` has shape .* For one frame add an axis of length 1"):
            next(pipeline.stream(one))
    with pytest.raises(TypeError, match="`frames` must be a list .* but is Image"):
        next(pipeline.stream(PIL.Image.new("RGB", (20, 16))))


def test_the_stream_reads_no_further_than_the_chunk_it_computes(pipeline):
    read = []

    def frames():
        for number, frame in enumerate(clip(40)):
            read.append(number)
            yield frame

    stream = pipeline.stream(frames())
    for number, _ in zip(range(15), stream, strict=False):
        assert len(read) <= number + 1 + 5 + 4  # a chunk of 5 and a group of 4
    stream.close()
    assert len(read) < 28


@pytest.fixture(scope="module")
def without_memory():
    """As `pipeline`, but the autoencoder's convolutions see one frame, so that a still clip is still from the first frame on."""
    pipeline = build_tiny_video_pipeline()
    for module in pipeline.vae.modules():
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight.data[:, :, :-1] = 0
    return pipeline


def test_chunks_leave_no_jump(without_memory):
    """Chunks of 5 frames that overlap by one begin at every fourth frame; the frame shared by two is a mean of both."""
    made = without_memory(clip(14), output_type="np", color_fix=None).frames[0]
    changes = np.abs(np.diff(made, axis=0)).mean((1, 2, 3))
    borders = [3, 4, 7, 8]
    elsewhere = np.delete(changes, borders)
    assert changes[borders].mean() <= 1.1 * elsewhere.mean()


def test_tiles_differ_little_from_the_whole_frame(pipeline):
    video = clip(2, 24, 40)
    tiled, whole = (pipeline(video, output_type="np", color_fix=None, tile_size=size).frames for size in (64, 512))
    assert 0 < np.abs(whole - tiled).mean() < 0.1 * np.abs(whole - whole.mean()).mean()


def test_a_still_clip_stays_nearly_still(without_memory):
    """What a frame gets depends on its place in the chunk, by the transformer's positions, but little."""
    made = without_memory(np.repeat(clip(1), 11, axis=0), output_type="np").frames[0]
    assert np.abs(np.diff(made, axis=0)).mean() < 0.01


def test_tiles_of_the_autoencoder_have_their_own_caches(pipeline):
    video = clip(5, 20, 40)
    whole = pipeline(video, output_type="np", tile_size=1024).frames
    tiled = pipeline(video, output_type="np", tile_size=96).frames
    assert np.abs(whole - tiled).mean() < 0.01


def test_at_a_cut_everything_begins_anew(pipeline):
    first, second = clip(6) * 0.3, 1 - clip(6, seed=1) * 0.3
    both = pipeline(np.concatenate([first, second]), output_type="np").frames[0]
    assert np.allclose(both[:6], pipeline(first, output_type="np").frames[0], atol=1e-6)
    assert np.allclose(both[6:], pipeline(second, output_type="np").frames[0], atol=1e-6)


def test_colours_are_those_of_the_input():
    pipeline, video = build_tiny_video_pipeline(), clip(6)
    with torch.no_grad():  # a network whose frames have little contrast, so that nothing is clipped to [0, 1]
        pipeline.vae.decoder.conv_out.weight.mul_(0.1)
    made = pipeline(video, output_type="np").frames[0]
    own = pipeline(video, output_type="np", color_fix=None).frames[0]
    wanted = video.mean((0, 1, 2))
    assert np.abs(made.mean((0, 1, 2)) - wanted).max() < 0.03 < np.abs(own.mean((0, 1, 2)) - wanted).max()


def test_saved_and_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "video")
    loaded = LSGQuantVideoPipeline.from_pretrained(tmp_path / "video")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config["tile_size"] == 64 and loaded.config["frames_per_chunk"] == 5 and loaded.config["timestep"] == 400
    same = (pipeline(clip(6), output_type="np").frames, loaded(clip(6), output_type="np").frames)
    assert np.allclose(*same, atol=1e-5)
    index = json.loads((tmp_path / "video" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "LSGQuantVideoPipeline"]
    assert "from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline" in (tmp_path / "video/pipeline.py").read_text()


def test_image_and_video_models_are_told_apart(pipeline, tiny_folder, tmp_path):
    pipeline.save_pretrained(tmp_path / "video")
    with pytest.raises(CheckpointError, match="LSGQuantVideoPipeline, not of QArtSRPipeline.*It is a video model"):
        QArtSRPipeline.from_pretrained(tmp_path / "video")
    with pytest.raises(CheckpointError, match="QArtSRPipeline, not of LSGQuantVideoPipeline.*It is an image model"):
        LSGQuantVideoPipeline.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "transformer" / "config.json").unlink(), "lacks transformer/config.json"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x" * 9), "vae"),
        (lambda folder: edit(folder / "model_index.json", tile_size=None), "lacks tile_size"),
        (lambda folder: edit(folder / "transformer" / "config.json", ffn_dim=128), "transformer.*ffn"),
    ],
)
def test_damaged_folders_are_refused(pipeline, tmp_path, damage, message):
    pipeline.save_pretrained(tmp_path / "video")
    damage(tmp_path / "video")
    with pytest.raises(CheckpointError, match=message):
        LSGQuantVideoPipeline.from_pretrained(tmp_path / "video")


def edit(path, **values):
    """Sets or, for None, removes entries of a JSON file."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def with_nan() -> np.ndarray:
    video = clip(3)
    video[1, 2, 3] = np.nan
    return video


@pytest.mark.parametrize(
    ("video", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "no frames"),
        (clip(3)[:0], {}, ValueError, "no frames"),
        ([clip(1)[0], clip(1, 18)[0]], {}, ValueError, r"frames\[1\].*20 x 18.*20 x 16"),
        (with_nan(), {}, ValueError, r"frames\[1\].*NaN"),
        (clip(1)[0], {}, ValueError, r"expected \(F, H, W, C\)"),
        ("none.mp4", {}, VideoFileError, "none.mp4"),
        (b"clip.mp4", {}, TypeError, "is bytes"),
        (iter(clip(2)), {}, TypeError, r"pipeline.stream\(frames\)"),
        (np.zeros((2, 16, 16, 4), np.uint8), {}, ValueError, "partly transparent"),
        (clip(2), {"upscale": 0}, ValueError, "upscale"),
        (clip(2), {"frames_per_chunk": 0}, ValueError, "frames_per_chunk"),
        (clip(2), {"frames_per_chunk": 2.5}, TypeError, "frames_per_chunk"),
        (clip(2), {"frames_per_chunk": 4, "chunk_overlap": 3}, ValueError, "at most half"),
        (clip(2), {"tile_size": 16}, ValueError, "tile_size"),
        (clip(2), {"color_fix": "wavelet"}, ValueError, "color_fix"),
        (clip(2), {"output_type": "latent"}, ValueError, "output_type"),
    ],
)
def test_bad_input_is_refused(pipeline, video, arguments, error, message):
    with pytest.raises(error, match=message):
        pipeline(video, **arguments)


def test_frames_may_come_from_files(pipeline, tmp_path):
    video = (clip(3) * 255).round().astype(np.uint8)
    for number, frame in enumerate(video):
        PIL.Image.fromarray(frame).save(tmp_path / f"{number:03}.png")
    made = pipeline(tmp_path / "%03d.png", output_type="np").frames[0]
    assert np.array_equal(made, pipeline(video, output_type="np").frames[0])
    assert np.array_equal(made, np.stack(list(pipeline.stream(str(tmp_path / "%03d.png")))))


def test_an_empty_stream_is_refused(pipeline):
    with pytest.raises(ValueError, match="There are no frames"):
        list(pipeline.stream([]))


def test_a_chunk_may_be_longer_than_the_clip(pipeline):
    assert pipeline(clip(3), frames_per_chunk=33, output_type="np").frames.shape[1] == 3


def test_a_result_that_does_not_fit_into_memory_is_refused_at_once(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("qartsr_pipeline.pipeline_lsgquant.free_main_memory", lambda: 1000)
    with pytest.raises(NotEnoughMemory, match=r"pipeline.stream\(frames\)"):
        pipeline(clip(3))
    for number in range(3):
        PIL.Image.new("RGB", (20, 16)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr("qartsr_pipeline.pipeline_lsgquant.read_frames", lambda clip: pytest.fail("it was read"))
    with pytest.raises(NotEnoughMemory, match="3 enlarged frames of 80 x 64 pixels"):
        pipeline(tmp_path / "%d.png")


def test_a_tile_that_does_not_fit_into_memory_is_refused_with_one_that_does(pipeline, monkeypatch):
    monkeypatch.setattr("qartsr_pipeline.pipeline_lsgquant.free_memory", lambda device: 20_000_000)
    with pytest.raises(NotEnoughMemory, match=r"One tile of 256 x 256 pixels.*Pass tile_size=\d+, which fits") as refused:
        next(pipeline.stream(clip(1, 70, 80)))
    side = int(str(refused.value).split("tile_size=")[1].split(",")[0])
    assert next(pipeline.stream(clip(1, 70, 80), tile_size=side)).shape == (280, 320, 3)
    monkeypatch.setattr("qartsr_pipeline.pipeline_lsgquant.free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match="Free some memory"):
        next(pipeline.stream(clip(1)))


def test_components_must_fit():
    pipeline = build_tiny_video_pipeline()
    parts = dict(pipeline.components)
    with pytest.raises(ValueError, match="timestep"):
        LSGQuantVideoPipeline(**parts, timestep=1000)
    with pytest.raises(ValueError, match="flow-matching"):
        LSGQuantVideoPipeline(**parts | {"scheduler": DDPMScheduler()})
    with pytest.raises(ValueError, match="latent channels"):
        LSGQuantVideoPipeline(**parts | {"vae": type(pipeline.vae)(base_dim=8, z_dim=16, dim_mult=[1], temperal_downsample=[])})


def test_what_is_not_finite_is_reported():
    broken = build_tiny_video_pipeline()
    with torch.no_grad():
        broken.transformer.proj_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="'transformer' gave NaN"):
        broken(clip(2))


@needs_group_offload
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_offloaded_in_groups_gives_the_same(pipeline, kind):
    offloaded = build_tiny_video_pipeline()
    offloaded.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)
    assert np.array_equal(offloaded(clip(2), output_type="np").frames, pipeline(clip(2), output_type="np").frames)


def test_offloaded_layer_by_layer_gives_the_same(pipeline):
    offloaded = build_tiny_video_pipeline()
    for part in (offloaded.transformer, offloaded.vae):
        cpu_offload(part, torch.device("cpu"), offload_buffers=True)
    assert np.array_equal(offloaded(clip(2), output_type="np").frames, pipeline(clip(2), output_type="np").frames)


def test_bfloat16_computes_in_bfloat16(pipeline, tmp_path):
    """WAN's tables and norms stay in float32, as diffusers has it; they do not decide what the transformer computes in."""
    pipeline.save_pretrained(tmp_path / "video")
    loaded = LSGQuantVideoPipeline.from_pretrained(tmp_path / "video", dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert compute_dtype(loaded.transformer) == torch.bfloat16 != loaded.transformer.scale_shift_table.dtype
    made, exact = (one(clip(2), output_type="np").frames for one in (loaded, pipeline))
    assert 0 < np.abs(made - exact).mean() < 0.01


def test_threads_share_a_pipeline(pipeline):
    video = clip(3)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: pipeline(video, output_type="np").frames, range(2)))
    assert np.array_equal(*made) and np.array_equal(made[0], pipeline(video, output_type="np").frames)


def test_the_generic_pipeline_of_diffusers_loads_it(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "video")
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "video", trust_remote_code=True), LSGQuantVideoPipeline)
