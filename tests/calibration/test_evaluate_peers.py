"""Evaluation beside other upscalers, with LPIPS and DISTS, and without ground truth."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from qartsr_pipeline.calibration.evaluation import evaluate
from qartsr_pipeline.calibration.evaluation.peers import RealEsrgan, lanczos
from qartsr_pipeline.calibration.perceptual import Lpips
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.image.metrics import psnr_y
from tiny_models import build_tiny_pipeline


@pytest.fixture(scope="module")
def data(photographs, tmp_path_factory):
    """Two photographs of 75 x 70 pixels."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(2):
        with Image.open(photographs / f"picture_{index}.png") as image:
            image.crop((60, 60, 135, 130)).save(folder / f"picture_{index}.png")
    return folder


@pytest.fixture
def outputs(data, tmp_path):
    """What Pillow's Lanczos makes of them, as another upscaler's files."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    for path, name in zip(sorted(data.iterdir()), ("picture_0.png", "picture_1_x4.webp"), strict=True):
        with Image.open(path) as image:
            high = image.crop((0, 0, 72, 68))
        low = high.resize((18, 17), Image.Resampling.BICUBIC)
        low.resize(high.size, Image.Resampling.LANCZOS).save(folder / name, lossless=True)
    return folder


def test_finished_outputs_and_functions_get_rows(data, outputs):
    options = {"peers": {"theirs": outputs, "lanczos": lanczos, "grey": lambda low: torch.full((1, 3, 68, 72), 0.5)}}
    seen = []
    bicubic, theirs, here, grey = evaluate({}, data, on_image=lambda image: seen.append(list(image.outputs)), **options)
    assert [row.name for row in (bicubic, theirs, here, grey)] == ["bicubic", "theirs", "lanczos", "grey"]
    assert {row.kind for row in (theirs, here, grey)} == {"peer"} and seen[0] == ["bicubic", *options["peers"], "original"]
    assert theirs.values == pytest.approx(here.values, abs=0.05)  # Pillow rounds the low-resolution image otherwise
    assert theirs.gain == pytest.approx(theirs.values["psnr_y"] - bicubic.values["psnr_y"]) and theirs.gain != 0
    assert theirs.seconds is None and here.seconds > 0 and grey.gain < theirs.gain
    pixels = np.asarray(Image.open(data / "picture_0.png").convert("RGB"))[:68, :72] / 255
    assert grey.per_image["psnr_y"][0] == pytest.approx(psnr_y(np.full_like(pixels, 128 / 255), pixels), abs=1e-3)


def test_outputs_that_do_not_fit_are_named(data, outputs, tmp_path, tiny_pipeline):
    with pytest.raises(ValueError, match="two rows named 'bicubic'"):
        evaluate({}, data, peers={"bicubic": outputs})
    with pytest.raises(ValueError, match="image 1 is no file"):
        evaluate({}, [Image.open(data / "picture_0.png")], peers={"theirs": outputs})
    with pytest.raises(FileNotFoundError, match="outputs of theirs: .*nowhere"):
        evaluate({}, data, peers={"theirs": tmp_path / "nowhere"})
    Image.new("RGB", (75, 70)).save(outputs / "picture_0_out.png")
    with pytest.raises(ValueError, match="picture_0.png and .*picture_0_out.png both belong to"):
        evaluate({}, data, peers={"theirs": outputs})
    (outputs / "picture_0.png").unlink()
    with pytest.raises(ValueError, match=r"picture_0_out.png has 75 x 70 pixels, expected 72 x 68"):
        evaluate({}, data, peers={"theirs": outputs})
    (outputs / "picture_0_out.png").unlink()
    with pytest.raises(FileNotFoundError, match="holds no picture_0 for .*picture_0.png"):
        evaluate({}, data, peers={"theirs": outputs})
    for peer, message in (
        (lambda low: low, "made an image of shape"),
        (lambda low: torch.full((1, 3, 68, 72), math.nan), "finite"),
    ):
        with pytest.raises(ValueError, match=f"picture_0.png: broken .*{message}"):
            evaluate({}, data, peers={"broken": peer})


def test_without_ground_truth_the_distance_to_full_precision_is_left(data, tiny_pipeline, backbones, own_weights):
    models = {"full": build_tiny_pipeline(1), "other": tiny_pipeline}
    options = {"color_fixes": [None], "ground_truth": False, "backbones": backbones, "metrics": ["psnr_y", "lpips"]}
    sheets = []
    low = [Image.open(data / "picture_0.png").crop((0, 0, 10, 9))]
    bicubic, peer, full, other = evaluate(models, low, peers={"lanczos": lanczos}, on_image=sheets.append, **options)
    assert not bicubic.values and not peer.values and not full.values and bicubic.images == full.images == 1
    outputs = sheets[0].outputs
    assert outputs["other"].shape == (1, 3, 36, 40) and "original" not in outputs
    assert set(other.values) == {"psnr_y_to_full_precision", "lpips_to_full_precision", "bicubic_to_full_precision"}
    assert other.values["psnr_y_to_full_precision"] == pytest.approx(psnr_y(outputs["other"], outputs["full"]))
    by_hand = Lpips("alex", backbones)(outputs["other"] * 2 - 1, outputs["full"] * 2 - 1).item()
    assert other.values["lpips_to_full_precision"] == pytest.approx(by_hand, rel=1e-5)
    assert full.seconds > 0 and full.gain is None


def test_the_command_says_that_there_is_no_ground_truth(tiny_folder, tmp_path, capsys):
    build_tiny_pipeline(1).save_pretrained(tmp_path / "full")
    (tmp_path / "low").mkdir()
    Image.new("RGB", (10, 9), "teal").save(tmp_path / "low" / "a.png")
    options = ["--data", tmp_path / "low", "--no-ground-truth", "--no-color-fix", "--lanczos", "--device", "cpu"]
    assert main(["evaluate", *map(str, [tmp_path / "full", tiny_folder, *options])]) == 0
    said = capsys.readouterr().out
    assert "There is no ground truth" in said and "PSNR-Y to full precision" in said and "| lanczos " in said
    assert "low resolution: the images themselves" in said and "over bicubic" not in said


def test_images_that_are_too_small_for_a_metric_are_named(backbones, own_weights):
    for metric, least in (("ssim_y", 19), ("lpips", 31), ("dists", 16)):
        image = np.zeros((64, least // 4 * 4, 3), np.uint8)
        if metric == "dists":
            image = image[:, :12]
        with pytest.raises(ValueError, match=f"image 1: .*at least {least} x {least} pixels.*, got {image.shape[1]} x 64"):
            evaluate({}, [image], peers={"lanczos": lanczos}, metrics=[metric], backbones=backbones)


class Net:
    """Stands in for ncnn.Net: repeats each pixel 4 times."""

    factor, code = 4, 0

    def __init__(self):
        self.opt = SimpleNamespace()

    def load_param(self, path):
        return self.code

    def load_model(self, path):
        return self.code

    def create_extractor(self):
        return self

    def input(self, name, planes):
        self.planes = planes

    def extract(self, name):
        return 0, self.planes.repeat(self.factor, 1).repeat(self.factor, 2)


def test_real_esrgan_runs_through_ncnn(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ncnn", SimpleNamespace(Net=Net, Mat=lambda planes: planes))
    net = tmp_path / "realesrgan-x4plus"
    with pytest.raises(FileNotFoundError, match=r"realesrgan-x4plus.param is not there: give the folder models/"):
        RealEsrgan(net)
    for ending in (".param", ".bin"):
        net.with_name(net.name + ending).touch()
    upscaler = RealEsrgan(net, threads=1)
    assert upscaler.network.opt.num_threads == 1 and upscaler.network.opt.use_vulkan_compute is False
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(upscaler.upscale(pixels), pixels.repeat(4, 0).repeat(4, 1))
    assert evaluate({}, data, peers={"Real-ESRGAN": upscaler})[1].seconds > 0
    monkeypatch.setattr(Net, "factor", 2)
    with pytest.raises(ValueError, match="made no image of 16 x 12 pixels from 4 x 3"):
        upscaler.upscale(pixels)
    monkeypatch.setattr(Net, "code", -1)
    with pytest.raises(ValueError, match="ncnn cannot read"):
        RealEsrgan(net)
    monkeypatch.setitem(sys.modules, "ncnn", None)
    with pytest.raises(ImportError, match=r"pip install 'qartsr\[peers\]'.*--outputs"):
        RealEsrgan(net)
