"""The size of a result, the blend with the original, and what QArtSR Upscale says and shows after a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from qartsr_pipeline import QArtSRPipeline


@pytest.fixture
def model(comfy, tiny_folder):
    from comfy_nodes.managed_model import load_model

    return load_model("tiny", tiny_folder, "auto", "auto")


def upscale(nodes, model, image, mask=None, **changes):
    """The node's output; options of older workflows, which do not know the others, unless `changes` has them."""
    options = {"scale": 4.0, "long_side": 0, "tile_size": 0, "tile_overlap": 0, "color_fix": "wavelet"}
    options |= {"sample_posterior": False, "seed": 0} | changes
    return nodes["QArtSRUpscale"].execute(model=model, image=image, mask=mask, **options)


@pytest.mark.parametrize(
    "inputs, size",
    [
        ({}, (120, 200)),
        ({"scale": 1.5}, (45, 75)),
        ({"scale": 1.5, "long_side": 173}, (104, 173)),
        ({"size": "x2", "long_side": 173}, (60, 100)),
        ({"size": "x4", "scale": 2.0}, (120, 200)),
        ({"size": "long side", "side": 101, "long_side": 173}, (61, 101)),
        ({"size": "short side", "side": 101}, (101, 168)),
        ({"size": "megapixels", "megapixels": 0.01}, (79, 132)),
        ({"size": "long side", "side": 20}, (12, 20)),
        ({"long_side": 20}, (12, 20)),
    ],
)
def test_each_way_to_give_a_size(comfy, inputs, size):
    from comfy_nodes.target_size import Sizing
    from qartsr_pipeline.image.resize import enlarged_size

    assert enlarged_size((30, 50), Sizing(**inputs).factor((30, 50))) == size


@pytest.mark.parametrize(
    "inputs, possible",
    [
        ({"size": "long side", "side": 4000}, "at most 400 pixels"),
        ({"size": "short side", "side": 4000}, "at most 240 pixels"),
        ({"size": "megapixels", "megapixels": 1.0}, "at most 0.09 megapixels"),
        ({"long_side": 4000}, "long_side up to 400"),
        ({"size": "huge"}, "x2, x4, long side"),
    ],
)
def test_what_is_too_large_is_refused_with_what_is_possible(comfy, inputs, possible):
    from comfy_nodes.target_size import Sizing

    with pytest.raises(ValueError, match=possible):
        Sizing(**inputs).factor((30, 50))


def test_a_target_below_the_image_is_resampled_without_the_model_and_said(nodes, model, monkeypatch):
    def never(self, image, **options):
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(QArtSRPipeline, "__call__", never)
    mask = torch.zeros(1, 40, 80)
    mask[:, :, 40:] = 1
    image = torch.zeros(1, 40, 80, 3) + torch.tensor([0.2, 0.5, 0.8])
    image[:, :, 40:] = 0  # what is transparent must not darken the edge
    output = upscale(nodes, model, image, mask, size="long side", side=20)
    result, transparency = output.args
    assert result.shape == (1, 10, 20, 3) and transparency.shape == (1, 10, 20)
    torch.testing.assert_close(result[0, 5, :10], torch.tensor([0.2, 0.5, 0.8]).expand(10, 3), atol=1e-3, rtol=0)
    assert float(transparency[0, 5, 2]) == 0 and float(transparency[0, 5, 17]) == 1
    assert (
        "20 x 10 from 80 x 40 (long side 20), smaller than the image: resampled, the model was not used" in output.ui["text"][0]
    )


def test_fidelity_is_the_pipelines(nodes, model, tiny_folder):
    image = torch.rand(1, 12, 10, 3)
    pipe = QArtSRPipeline.from_pretrained(tiny_folder)
    expected = pipe(image.permute(0, 3, 1, 2), fidelity=0.3, output_type="pt").images
    result = upscale(nodes, model, image, fidelity=0.3).args[0]
    torch.testing.assert_close(result.permute(0, 3, 1, 2), expected, atol=1e-6, rtol=0)
    assert (result - upscale(nodes, model, image).args[0]).abs().max() > 0.01


def test_the_line_after_a_run(nodes, model):
    output = upscale(nodes, model, torch.rand(2, 40, 24, 3), tile_size=64, size="x4")
    expected = r"2 images, 96 x 160 from 24 x 40 \(x4\), \d+ tiles of 56 x 64 each, \d+\.\d s, main memory at most \d+\.\d GB,"
    assert re.fullmatch(expected + " full precision", output.ui["text"][0])
    assert "1 tile, " in upscale(nodes, model, torch.rand(1, 4, 4, 3)).ui["text"][0]


def test_before_and_after_are_kept_as_small_files_of_one_size(nodes, model, tmp_path, monkeypatch):
    monkeypatch.setattr("comfy_nodes.run_summary.LONGEST", 60)
    monkeypatch.setattr("comfy_nodes.run_summary.KEPT", 2)
    image, mask = torch.full((1, 40, 24, 3), 0.9), torch.zeros(1, 40, 24)
    mask[:, :20] = 1
    (older,) = upscale(nodes, model, image).ui["qartsr_pair"]
    (pair,) = upscale(nodes, model, image, mask).ui["qartsr_pair"]
    assert {path.name for path in Path(tmp_path / "temp").iterdir()} == set(pair.values()) != set(older.values())
    for name in ("before", "after"):
        shown = Image.open(tmp_path / "temp" / pair[name])
        assert shown.size == (36, 60) and shown.getpixel((18, 5))[1] < 60 < 180 < shown.getpixel((18, 55))[1]


def test_samples_are_copied_once(nodes, tmp_path):
    from comfy_nodes.installation import copy_samples

    rider = tmp_path / "input" / "qartsr_rider.png"
    assert rider.is_file() and (tmp_path / "input" / "qartsr_batch" / "left.png").is_file()
    rider.unlink()
    copy_samples()
    assert not rider.exists()
