"""Training of the small video model: its start, its clips, stopping, resuming, export."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from calibration.teacher.video import export as export_video
from calibration.teacher.video import model as video_model
from calibration.teacher.video import train as training
from calibration.teacher.video.clips import MovingClips, Shares
from calibration.teacher.video.model import PlainAttention, new_model
from calibration.teacher.video.start import ANCHORS, LUMA, cosine_transform
from calibration.teacher.video.train import VideoTrainer, frame_loss
from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.calibration.data.clips import moving_by_whole_pixels
from qartsr_pipeline.calibration.retraining.trainer import load_state
from qartsr_pipeline.image.metrics import psnr_y

PHASES = ("--phases", "images:1:1e-3:32:2", "latent:1:1e-3:32:2", "pixel:1:1e-3:32:2", "whole:1:1e-3:32:2", "joint:2:1e-3:32:2")


@pytest.fixture
def small(monkeypatch):
    """A transformer of one narrow layer, and small clips to validate on."""
    build = video_model.WanTransformer3DModel
    monkeypatch.setattr(
        video_model,
        "WanTransformer3DModel",
        lambda **sizes: build(**sizes | {"num_attention_heads": 1, "ffn_dim": 32, "num_layers": 1}),
    )
    monkeypatch.setattr(video_model.WanTransformer3DModel, "from_config", build.from_config, raising=False)
    monkeypatch.setattr("calibration.teacher.video.clips.VALIDATION_SIDE", 32)


def images(count: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([torch.sin(0.3 * rows + 0.4 * columns + phase).expand(3, -1, -1) * 0.8 for phase in range(count)])


def test_block_transform_loses_no_luma():
    encode, decode = cosine_transform()
    luma = torch.kron(torch.tensor([LUMA]), torch.eye(16))  # (16, 48): luma of every pixel of a block
    assert torch.allclose(luma @ decode @ encode, luma, atol=1e-5)
    assert torch.allclose(encode @ decode, torch.eye(24), atol=1e-5)


@torch.no_grad()
def test_training_starts_at_an_autoencoder_and_an_identity(small):
    model = new_model(0)
    clip = images(5).transpose(0, 1)[None]  # stock encoding drops frames beyond 4n + 1
    latents = model.encode(clip)
    assert torch.equal(model.step(latents), latents)
    made = model.decode(latents)
    assert psnr_y((made[:, :, 1] + 1) / 2, (clip[:, :, 1] + 1) / 2) > 30  # strong stripes; photographs: above 40
    assert torch.allclose(made, model.decode(latents, temporal=False), atol=1e-5)
    stock = AutoencoderKLWan.from_config(model.vae.config)  # without our layers' short cuts
    stock.load_state_dict(model.vae.state_dict())
    assert torch.allclose(stock.encode(clip).latent_dist.mode(), latents, atol=1e-5)
    assert torch.allclose(stock.decode(latents).sample, made.clamp(-1, 1), atol=1e-5)


@torch.no_grad()
def test_attention_is_the_stock_one(small):
    attention = new_model(0).transformer.blocks[0].attn1
    x, context = torch.randn(2, 6, 64), torch.randn(2, 4, 64)
    angles = torch.rand(1, 6, 1, 32).repeat_interleave(2, -1)
    for arguments in ((x, None, None, (angles.cos(), angles.sin())), (x, context)):
        own = PlainAttention()(attention, *arguments)
        attention.set_processor(attention._default_processor_cls())
        assert torch.allclose(own, attention(*arguments), atol=1e-5)


def test_clips_move_as_they_are_told_and_depend_on_the_seed_only():
    photograph = np.random.default_rng(0).integers(0, 256, (120, 140, 3), dtype=np.uint8)
    real = np.random.default_rng(1).integers(0, 256, (9, 70, 80, 3), dtype=np.uint8)
    for shares in (Shares(), Shares(real=1), Shares(procedural=1, in_front=1, exposure=1), Shares(procedural=0, whole_pixels=0)):
        clips = MovingClips([photograph], [real, real[:2]], frames=4, shares=shares)
        made = [clips.sample(3, 48, np.random.default_rng(seed)) for seed in (0, 0, 1)]
        assert made[0].shape == (12, 3, 48, 48) and made[0].min() >= 0 and made[0].max() <= 1
        assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    image = torch.from_numpy(photograph).permute(2, 0, 1).float() / 255
    clip = moving_by_whole_pixels(image, 3, 40, np.random.default_rng(3))
    steps = [(y, x) for y in range(-4, 5) for x in range(-4, 5)]
    inner = clip[:, :, 8:-8, 8:-8]
    assert any(torch.equal(clip[1, :, 8 + y : 32 + y, 8 + x : 32 + x], inner[2]) for y, x in steps)


def test_the_loss_sees_errors_in_time():
    target = torch.zeros(1, 3, 4, 8, 8)
    steady, flickering = torch.full_like(target, 0.1), torch.full_like(target, 0.1)
    flickering[:, :, ::2] *= -1
    assert frame_loss(flickering, target) > frame_loss(steady, target) > 0 == frame_loss(target, target)


def test_trained_stopped_resumed_and_exported(small, photographs, tmp_path, monkeypatch):
    """All phases; a run that was stopped in between ends with the same weights; the export enlarges a clip."""
    options = (
        "--data",
        str(photographs),
        "--clips",
        str(photographs),
        "--frames",
        "3",
        "--held-out",
        "1",
        "--fp32",
        "--every",
        "9",
    )
    training.main([*options, *PHASES, "--output", str(tmp_path / "once")])
    steps, train_step = [], VideoTrainer._train_step

    def step_and_stop(self, phase, optimizer):
        steps.append(phase.name)
        if len(steps) == 3:
            self.progress = type("Stop", (), {"stepped": lambda *_: True})()
        return train_step(self, phase, optimizer)

    monkeypatch.setattr(VideoTrainer, "_train_step", step_and_stop)
    with pytest.raises(SystemExit):
        training.main([*options, *PHASES, "--output", str(tmp_path / "twice")])
    assert steps == ["images", "latent", "pixel"]
    training.main(["--resume", "--output", str(tmp_path / "twice")])
    once, twice = (load_state(tmp_path / name / "state.pt") for name in ("once", "twice"))
    assert all(torch.equal(value, twice["average"][name]) for name, value in once["average"].items())
    assert {"model", "bypass", "bicubic", "autoencoder", "flicker_model"} <= once["history"][-1].keys()
    anchors = once["model"]["vae.decoder.conv_in.weight"][-ANCHORS:]
    assert not anchors.any()  # constants, whatever was trained
    start = new_model(0).state_dict()
    for name in ("patch_embedding.bias", "blocks.0.attn1.to_out.0.weight", "scale_shift_table", "blocks.0.scale_shift_table"):
        held, whole = (state[f"transformer.{name}"] for state in (once["model"], start))
        last = (..., slice(-2, None)) if "table" in name else slice(-2, None)
        assert torch.allclose(held[last], whole[last], rtol=1e-4) and not torch.equal(held, whole)
    taps = once["model"]["vae.decoder.mid_block.resnets.0.conv1.weight"][:, :, 0]
    assert taps.any()  # the frames before are seen after the joint phase
    export_video.main([str(tmp_path / "once" / "state.pt"), str(tmp_path / "video-fp")])
    pipeline = LSGQuantVideoPipeline.from_pretrained(tmp_path / "video-fp", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(np.zeros((2, 8, 8, 3), np.uint8), output_type="np").frames.shape == (1, 2, 32, 32, 3)
    record = json.loads((tmp_path / "video-fp" / "training.json").read_text())
    assert record["clips"]["count"] == 4 and str(tmp_path) not in json.dumps(record) and record["timestep"] == 400
