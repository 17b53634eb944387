"""Photographs to train on and a teacher small enough for a test."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from calibration.teacher import train as teacher
from qartsr_pipeline.calibration import perceptual
from qartsr_pipeline.calibration.backbones import LAYOUTS
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.retraining.report import plot_if_possible
from tiny_models import build_tiny_unet, build_tiny_vae

PHASES = ("--phases", "autoencoder:2:1e-3:32:4", "pixel:4:1e-3:32:4")
OPTIONS = ("--held-out", "1", "--every", "10", "--seed", "3", "--fp32", "--degradation", "realesrgan", "--procedural", "0.5")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Folder of four images of 206 x 203 pixels."""
    folder = tmp_path_factory.mktemp("photographs")
    for index, image in enumerate(DeadLeaves().sample(4, 206, np.random.default_rng(5))):
        pixels = (image.permute(1, 2, 0).numpy()[:203] * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture_{index}.png")
    return folder


def build_tiny_models(seed: int):
    """In the place of `calibration.teacher.model.build_models`: a few thousand weights instead of millions."""
    torch.manual_seed(seed)
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return build_tiny_vae(), build_tiny_unet(), scheduler, torch.randn(1, 4, 16)


@pytest.fixture(scope="session")
def training_arguments():
    """What `trained` was trained with, beside data and output: six steps in two phases."""
    return (*PHASES, *OPTIONS)


@pytest.fixture(scope="session")
def trained_once(photographs, training_arguments, tmp_path_factory):
    """The output folder of a finished run; not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.teacher.model.build_models", build_tiny_models)
        patch.setattr("qartsr_pipeline.calibration.retraining.trainer.plot_if_possible", plot_if_possible)
        patch.setattr("qartsr_pipeline.calibration.data.pairs.VALIDATION_SIDE", 64)
        teacher.main(["--data", str(photographs), "--output", str(folder), *training_arguments])
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of that folder, for a test in which `calibration.teacher.train` builds tiny models."""
    monkeypatch.setattr("qartsr_pipeline.calibration.data.pairs.VALIDATION_SIDE", 64)
    monkeypatch.setattr("calibration.teacher.model.build_models", build_tiny_models)
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Folder with files laid out as torchvision's AlexNet and VGG16, of random weights."""
    folder = tmp_path_factory.mktemp("backbones")
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS.values():
        shapes = layout.shapes().items()
        sizes = {name: (2 / np.prod(shape[1:])) ** 0.5 if len(shape) == 4 else 0.1 for name, shape in shapes}
        tensors = {name: torch.randn(shape, generator=generator) * sizes[name] for name, shape in shapes}
        save_file(tensors, folder / f"{layout.file}.safetensors")
    return folder


@pytest.fixture
def own_weights(monkeypatch, tmp_path):
    """Ones in the place of the packages' own weights, for what does not depend on them: no package is needed."""
    for name, widths in (("vgg", (64, 128, 256, 512, 512)), ("alex", (64, 192, 384, 256, 256))):
        state = {f"lin{index}.model.1.weight": torch.ones(1, width, 1, 1) for index, width in enumerate(widths)}
        torch.save(state, tmp_path / f"{name}.pth")
    torch.save({name: torch.ones(1, 1475, 1, 1) for name in ("alpha", "beta")}, tmp_path / "weights.pt")
    monkeypatch.setattr(perceptual, "package_file", lambda package, distribution, name: tmp_path / name.split("/")[-1])
