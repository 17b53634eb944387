"""Calibration that starts from a quantized folder."""

import json

import pytest
import torch
from recipes_for_tests import COMPONENTS, all_layers, calibrated, picture, small_recipe

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.freeze import freeze
from tiny_models import build_tiny_pipeline

FULL = "layer.adapter_rank=64"  # as wide as the widest layer: whatever was merged into a weight fits


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """bits -> folder of a model that was trained a little, so that it is not what initialisation gives."""

    def make(bits):
        folder = tmp_path_factory.getbasetemp() / f"quantized-{bits[0]}-{bits[1]}"
        if not folder.exists():
            pipeline, result = calibrated(small_recipe("steps=6", "stages.0.share=0", "stages.1.lr=0.05"), bits)
            for component in COMPONENTS:
                freeze(getattr(pipeline, component), result.schemes[component])
            pipeline.save_pretrained(folder)
        return folder

    return make


def of_folder(folder):
    pipeline = QArtSRPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    "bits", [pytest.param((8, 8), marks=pytest.mark.slow), (4, 4), pytest.param((2, 3), marks=pytest.mark.slow)]
)
def test_it_begins_with_what_the_folder_computes(quantized, bits):
    folder = quantized(bits)
    pipeline, result = calibrated(small_recipe("steps=0", FULL), bits, start=folder)
    loaded = of_folder(folder)
    for name, layer in all_layers(pipeline).items():
        component, _, path = name.partition(".")
        deployed = getattr(loaded, component).get_submodule(path)
        x = torch.randn(1, layer.weight.shape[1], *[5] * (layer.weight.dim() - 2))
        torch.testing.assert_close(layer(x), deployed(x), rtol=1e-3, atol=1e-3 * float(deployed(x).abs().max()))
    assert result.start["folder"] == folder.name


def test_other_ranks_and_bits_start_close_to_it(quantized):
    folder = quantized((4, 4))
    before = picture(of_folder(folder))[0]
    for change, bits in (("layer.branch_rank=4", (4, 4)), ("layer.branch_rank=2", (8, 8))):
        started = picture(calibrated(small_recipe("steps=0", FULL, change), bits, start=folder)[0])[0]
        fresh = picture(calibrated(small_recipe("steps=0", FULL, change), bits)[0])[0]
        assert psnr_y(started, before) > psnr_y(fresh, before)


def test_bounds_of_other_bits_belong_to_the_smoothing_of_the_folder(quantized, tmp_path):
    """A folder that computes the same with 16 times the smoothing is as good a start."""
    same = of_folder(quantized((4, 4)))
    for layer in (layer for part in COMPONENTS for layer in getattr(same, part).modules() if isinstance(layer, DeployedLayer)):
        layer.smooth *= 16
        layer.input_scale *= 16
        layer.weight_scale /= 16
        if layer.spec.rank:
            layer.branch_down /= 16
    same.save_pretrained(tmp_path / "same")
    first, second = (
        picture(calibrated(small_recipe("steps=0", FULL), (4, 8), start=folder)[0])[0]
        for folder in (quantized((4, 4)), tmp_path / "same")
    )
    assert psnr_y(first, second) > 45


def test_folders_that_cannot_be_started_from_say_why(quantized, tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "full")
    with pytest.raises(ValueError, match="has no quantized layer .*same model"):
        calibrated(small_recipe("steps=0"), start=tmp_path / "full")
    other = of_folder(quantized((4, 4)))
    other.vae.encoder.conv_in.weight_scale *= 3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is of another model"):
        calibrated(small_recipe("steps=0"), start=tmp_path / "other")
    (tmp_path / "other" / "quantization.json").write_text("{")
    with pytest.raises(ValueError, match="quantization.json cannot be read"):
        calibrated(small_recipe("steps=0"), start=tmp_path / "other")
    (tmp_path / "other" / "quantization.json").write_text(json.dumps({"bits": "w4a4", "data": {}}))
    with pytest.raises(ValueError, match="on another grid than that of SVDQuant"):
        calibrated(small_recipe(name="svdquant"), start=quantized((4, 4)))
