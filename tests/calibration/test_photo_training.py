"""The phase ``photo``: degradations, distances, discriminators, distilled pairs, and training with them."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_teacher import same

from calibration.teacher import export as export_teacher
from calibration.teacher import timestep_from_scratch
from calibration.teacher import train as teacher
from calibration.teacher.make_pairs import write_pairs
from calibration.teacher.perceptual.distilled_pairs import DistilledPairs
from calibration.teacher.perceptual.losses import DISCRIMINATORS, Adversary, PhotoLosses, discriminator_loss, generator_loss
from calibration.teacher.perceptual.settings import DISCRIMINATORS as DISCRIMINATOR_NAMES
from calibration.teacher.perceptual.settings import PhotoSettings
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.degradations import (
    MIXTURE,
    one_round,
    photo_degradation,
    random_sinc_kernel,
    sinc_kernel,
    two_rounds,
)
from qartsr_pipeline.calibration.data.patches import PhotographPatches, list_photographs
from qartsr_pipeline.calibration.retraining.trainer import Trainer, load_state

PHOTO = ("--phases", "photo:6:1e-3:32:2", "--held-out", "1", "--every", "3", "--seed", "3", "--fp32", "--degradation", "photo",
         "--lpips", "0", "--adversarial", "0.01")  # fmt: skip


SHORT = ("--held-out", "1", "--every", "2", "--seed", "3", "--fp32")


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """A stand-in for another upscaler."""
    return pixels.repeat(4, 0).repeat(4, 1)


@pytest.fixture(scope="session")
def distilled(photographs, tmp_path_factory):
    """Folder of three pairs with inputs of 32 x 32 pixels."""
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.teacher.make_pairs.SIDE", 32)
        write_pairs(PhotographPatches(list_photographs(photographs)), folder, 3, 0, enlarged)
    return folder


@pytest.mark.parametrize("size", [7, 21])
def test_sinc_kernels_sum_to_one_and_ring(size):
    kernel = sinc_kernel(math.pi / 3, size)
    assert kernel.shape == (size, size) and kernel.sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(kernel, kernel.T) and torch.equal(kernel, kernel.flip(0)) and kernel.min() < 0
    for seed in range(20):
        assert random_sinc_kernel(np.random.default_rng(seed)).sum() == pytest.approx(1, abs=1e-5)
    for cutoff, side in ((0.0, 7), (4.0, 7), (1.0, 8)):
        with pytest.raises(ValueError, match="expected a cutoff"):
            sinc_kernel(cutoff, side)


@pytest.mark.parametrize("degrade", [one_round, two_rounds])
def test_degradations_depend_on_the_generator_alone(degrade):
    high = DeadLeaves().sample(1, 96, np.random.default_rng(0))
    first, again, other = (degrade(high, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (1, 3, 24, 24) and first.min() >= 0 and first.max() <= 1


def test_the_mixture_keeps_some_images_clean():
    high = DeadLeaves().sample(1, 64, np.random.default_rng(0)).expand(60, -1, -1, -1)
    low = photo_degradation(high, 4, np.random.default_rng(0))
    clean = photo_degradation(high[:1], 4, _always("bicubic"))
    share = (low == clean).flatten(1).all(1).float().mean()
    assert share == pytest.approx(MIXTURE["bicubic"][0], abs=0.15)


def _always(kind):
    class Generator:
        def choice(self, *_, **__):
            return [kind]

    return Generator()


@pytest.mark.parametrize("kind, shape", [("patch", (2, 1, 6, 4)), ("unet", (2, 1, 48, 32))])
def test_discriminators_learn_to_tell_noise_from_flat_images(kind, shape):
    noise, flat = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, torch.zeros(2, 3, 48, 32)
    adversary = Adversary(PhotoSettings(lpips=0, discriminator=kind, discriminator_lr=1e-2), seed=1, device="cpu")
    assert adversary.model(flat).shape == shape and isinstance(adversary.model, DISCRIMINATORS[kind])
    losses = [adversary.learn(noise, flat) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0] and not adversary.has_won
    image = flat.clone().requires_grad_()
    adversary.verdict_loss(image).backward()
    assert image.grad.abs().sum() > 0 and all(p.requires_grad for p in adversary.model.parameters())
    assert tuple(DISCRIMINATORS) == DISCRIMINATOR_NAMES
    undecided = torch.zeros(1)
    assert generator_loss(undecided).item() == discriminator_loss(undecided, undecided).item() == pytest.approx(math.log(2))


def test_a_discriminators_nan_leaves_it_as_it_was():
    adversary = Adversary(PhotoSettings(lpips=0), seed=1, device="cpu")
    before = {name: value.clone() for name, value in adversary.model.named_parameters()}
    with pytest.raises(FloatingPointError, match="discriminator"):
        adversary.learn(torch.full((1, 3, 32, 32), math.nan), torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(before[name], value) for name, value in adversary.model.named_parameters())


def test_distilled_pairs_belong_together(distilled, photographs, tmp_path):
    pairs = DistilledPairs(distilled)
    up, peer = pairs.sample(4, 64, np.random.default_rng(0))
    again = pairs.sample(4, 64, np.random.default_rng(0))
    assert up.shape == peer.shape == (4, 3, 64, 64) and torch.equal(up, again[0]) and torch.equal(peer, again[1])
    assert (up - peer).abs().mean() < 0.5 * (up - peer.roll(1, 0)).abs().mean(), "input and target of different images"
    with pytest.raises(ValueError, match="use smaller patches"):
        pairs.sample(1, 128, np.random.default_rng(0))
    with pytest.raises(FileNotFoundError, match="make_pairs"):
        DistilledPairs(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a_low.png")
    with pytest.raises(ValueError, match="has no partner"):
        DistilledPairs(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a_peer.png")
    with pytest.raises(ValueError, match="not 4 times as large"):
        DistilledPairs(tmp_path)


def test_weights_that_cannot_be_meant_are_refused():
    for settings, message in (
        ({"lpips": 1.0}, "--backbone"),
        ({"l1": 0.0, "lpips": 0.0}, "one must be above 0"),
        ({"lpips": 0.0, "adversarial": -1.0}, "none may be negative"),
        ({"lpips": 0.0, "distilled_share": 2.0}, "--distilled-share"),
        ({"lpips": 0.0, "lpips_alex": 1.0}, "--alex"),
        ({"lpips": 0.0, "in_turn": True}, "--in-turn"),
    ):
        with pytest.raises(ValueError, match=message):
            PhotoSettings(**settings)


def test_terms_in_turn_add_up_to_the_same(backbones, own_weights):
    """Over two steps, and in their gradient; each step leaves one of the two out."""
    files = {"backbone": str(backbones / "vgg16.safetensors"), "alex": str(backbones / "alexnet-owt.safetensors")}
    together = PhotoSettings(l1=0.5, lpips=1.0, lpips_alex=0.7, dists=0.3, **files)
    in_turn = PhotoLosses(replace(together, in_turn=True))
    image, high = (torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in (0, 1))
    image.requires_grad_()
    losses = [in_turn(image, high, 2, step) for step in (0, 1)] + [2 * PhotoLosses(together)(image, high, 2)]
    first, second, both = (torch.autograd.grad(loss, image)[0] for loss in losses)
    assert (losses[0] + losses[1]).item() == pytest.approx(losses[2].item(), rel=1e-5)
    assert torch.allclose(first + second, both, atol=1e-6) and not torch.allclose(2 * first, both, atol=1e-4 * both.abs().max())


def test_stopped_and_resumed_is_bit_identical_to_uninterrupted(trained, photographs, distilled, tmp_path, monkeypatch, capsys):
    """With discriminator and distilled pairs, from a pipeline folder's weights; then exported."""
    start, outputs = tmp_path / "start", [tmp_path / "once", tmp_path / "twice"]
    arguments = ("--data", str(photographs), "--distilled", str(distilled), "--distilled-share", "0.5", *PHOTO)
    export_teacher.export(trained / "state.pt", start)
    arguments += ("--start", str(start))
    teacher.main([*arguments, "--output", str(outputs[0])])
    train_step, steps = Trainer._train_step, []

    def step_and_interrupt(self, phase, optimizer):
        steps.append(phase.name)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, phase, optimizer)

    monkeypatch.setattr(Trainer, "_train_step", step_and_interrupt)
    with pytest.raises(SystemExit):
        teacher.main([*arguments, "--output", str(outputs[1])])
    teacher.main(["--resume", "--output", str(outputs[1])])
    once, twice = (load_state(folder / "state.pt") for folder in outputs)
    for state in (once, twice):
        for row in state["history"]:
            del row["seconds"]
    assert same(once, twice) and len(steps) == 6
    history = json.loads((outputs[0] / "history.json").read_text())
    assert {"model", "model_real", "loss_l1", "loss_adversarial", "loss_discriminator"} <= history[-1].keys()
    export_teacher.export(outputs[0] / "state.pt", tmp_path / "model")
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["arguments"]["distilled"] == distilled.name, "a path of this machine in the record"
    QArtSRPipeline.from_pretrained(tmp_path / "model")


def test_training_lowers_the_loss(trained, photographs, tmp_path):
    arguments = ["--data", str(photographs), *PHOTO, "--phases", "photo:60:3e-3:32:4", "--every", "20"]
    teacher.main([*arguments, "--adversarial", "0.001", "--output", str(tmp_path / "photo")])
    losses = [row["loss"] for row in json.loads((tmp_path / "photo" / "history.json").read_text())]
    assert losses[-1] < 0.9 * losses[0]


def test_nan_stops_before_the_step(trained, photographs, tmp_path, monkeypatch, capsys):
    """The model's and the discriminator's weights in the state are those before the bad step."""
    output = tmp_path / "photo"
    teacher.main(["--data", str(photographs), *PHOTO, "--phases", "photo:3:1e-3:32:2", "--output", str(output)])
    before = (output / "state.pt").read_bytes()
    monkeypatch.setattr("calibration.teacher.perceptual.losses.generator_loss", lambda verdicts: verdicts.sum() * math.nan)
    with pytest.raises(SystemExit) as stopped:
        teacher.main(["--resume", "--output", str(output), "--phases", "photo:3:1e-3:32:2", "photo:3:1e-3:32:2"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "diverged" in said and "adversarial" in said and "--resume" in said
    assert (output / "state.pt").read_bytes() == before


def test_the_timestep_from_scratch_is_chosen_among_equals(trained, photographs, tmp_path, capsys):
    """Each candidate begins at the same autoencoder; a second call takes the finished ones as they are."""
    autoencoder, output = tmp_path / "autoencoder", tmp_path / "sweep"
    arguments = [str(autoencoder), "--output", str(output), "--timesteps", "20", "500", "--phases", "latent:2:1e-3:32:2"]
    teacher.main(["--data", str(photographs), "--output", str(autoencoder), "--phases", "autoencoder:2:1e-3:32:2", *SHORT])
    timestep_from_scratch.main([*arguments, "--least-bypass-cost", "-100"])
    sweep = json.loads((output / "sweep.json").read_text())
    assert [row["timestep"] for row in sweep["rows"]] == [20, 500] and sweep["chosen"] in (20, 500)
    states = [load_state(output / name / "state.pt") for name in ("t020", "t500")]
    assert [state["record"]["timestep"] for state in states] == [20, 500]
    assert same(*({key: state["model"][key] for key in state["model"] if key.startswith("vae.")} for state in states))
    with pytest.raises(SystemExit):
        timestep_from_scratch.main([*arguments, "--least-bypass-cost", "100"])
    assert "at no timestep does bypassing the UNet cost 100 dB" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        timestep_from_scratch.main([str(trained), *arguments[1:]])
    assert "begin at a finished autoencoder" in capsys.readouterr().err
