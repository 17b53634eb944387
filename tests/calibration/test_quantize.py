"""Post-training quantization and end-to-end training of a whole tiny pipeline, through to the folder on disk."""

import hashlib
import json

import numpy as np
import pytest
import torch

from calibration import quantize as command
from calibration.extended import Extended, keep_zero_inside, train
from calibration.initialise import Initialisation, initialise, smoothing_factor
from calibration.observers import observe
from calibration.pipeline_folder import save_pipeline
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.quantization.calibrating import calibrating_layers, prepare
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_pipeline


class SmoothPatches:
    """Random pictures with large structures, as a source of patches."""

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        coarse = torch.from_numpy(rng.random((count, 3, 5, 5), dtype=np.float32))
        return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def picture(pipeline):
    low = SmoothPatches().sample(1, 24, np.random.default_rng(5))
    return pipeline(low, output_type="pt", color_fix=None).images


def quantized(bits: str, bounds: str = "mse", rank: int = 4, **kwargs):
    pipeline = build_tiny_pipeline()
    schemes = command.fold_and_make_schemes(pipeline, command.parse_bits(bits), rank)
    batches = command.calibration_batches(SmoothPatches(), 4, 96, seed=0)
    errors = command.quantize(pipeline, schemes, batches, Initialisation(bounds=bounds), **kwargs)
    return pipeline, errors


@pytest.mark.parametrize("bounds", ["minmax", "percentile", "mse"])
def test_eight_bits_keep_the_picture_and_fewer_bits_lose_more(bounds):
    wanted = picture(build_tiny_pipeline())
    eight, four = (picture(quantized(bits, bounds)[0]) for bits in ("w8a8", "w4a4"))
    assert psnr_y(eight[0], wanted[0]) > 32  # random weights amplify errors more than trained ones
    assert psnr_y(eight[0], wanted[0]) > psnr_y(four[0], wanted[0]) + 3


def test_quantized_folder_loads_and_gives_the_same_picture(tmp_path):
    pipeline, errors = quantized("w8a8")
    save_pipeline(pipeline, tmp_path / "w8a8", command.RECORD_NAME, {"seed": 0})
    assert json.loads((tmp_path / "w8a8" / "quantization.json").read_text()) == {"seed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["w8a8"]
    loaded = QArtSRPipeline.from_pretrained(tmp_path / "w8a8")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(picture(loaded), picture(pipeline))
    assert {name.partition(".")[0] for name in errors} == {"unet", "vae"} and all(0 <= e < 1 for e in errors.values())


def test_the_branch_and_chosen_smoothing_lower_the_error():
    plain = sum(quantized("w4a4", "minmax", rank=0)[1].values())
    better = sum(quantized("w4a4", "mse", rank=4)[1].values())
    assert better < 0.8 * plain


def test_training_comes_closer_to_full_precision_and_leaves_the_weights_alone():
    pipeline = build_tiny_pipeline()
    schemes = command.fold_and_make_schemes(pipeline, (3, 4), 2)
    weights = {}

    def refine(calibrating):
        layers = {**calibrating_layers(calibrating.unet), **calibrating_layers(calibrating.vae)}
        digest = lambda: {n: hashlib.sha256(m.weight.numpy().tobytes()).hexdigest() for n, m in layers.items()}  # noqa: E731
        weights["before"] = digest()
        weights["loss"] = train(
            calibrating, build_tiny_pipeline(), SmoothPatches(), Extended(steps=25, patch=64, batch=2, lr=1e-2)
        )
        weights["after"] = digest()

    batches = command.calibration_batches(SmoothPatches(), 4, 96, seed=0)
    command.quantize(pipeline, schemes, batches, Initialisation(), refine, adapter_rank=2)
    assert weights["before"] == weights["after"]
    assert np.mean(weights["loss"][-5:]) < 0.8 * np.mean(weights["loss"][:3])


def test_bounds_that_crossed_zero_are_put_back():
    pipeline = build_tiny_pipeline()
    prepare(pipeline.vae, QuantizationScheme(LayerScheme(4, 4)))
    layer = next(iter(calibrating_layers(pipeline.vae).values()))
    with torch.no_grad():
        layer.input_lower.fill_(0.5)
        layer.weight_upper.fill_(-0.5)
    keep_zero_inside(pipeline)
    assert layer.input_lower == 0 and (layer.weight_upper == 0).all() and layer.input_upper == 1


def test_a_channel_that_nobody_reads_does_not_widen_the_bounds():
    layer = torch.nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight[:, 0] = 0
    model = torch.nn.Sequential(layer)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1000
    samples = observe({"0": layer}, model, [x])
    prepare(model, QuantizationScheme(LayerScheme(8, 8)))
    errors = initialise(calibrating_layers(model), samples, Initialisation())
    assert model[0].input_upper < 20 and errors["0"] < 1e-3


def test_smoothing_follows_its_formula():
    phi = smoothing_factor(torch.tensor([4.0, 1.0, 16.0]), torch.tensor([1.0, 1.0, 1.0]), 0.5)
    torch.testing.assert_close(phi, torch.tensor([0.5, 1.0, 0.25]) / 0.125 ** (1 / 3))  # x^-0.5, geometric mean 1


def test_a_layer_that_no_picture_reaches_is_named():
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "unused": torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="'unused'"):
        observe(dict(model.items()), model["used"], [torch.ones(1, 2)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "4bit"], "'4bit', expected a form such as w4a4"),
        (["--bits", "w5a4"], "weight_bits is 5"),
        (["--keep", "decoder"], "PATTERN=BITS"),
        (["--data", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(tiny_folder, tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tiny_folder), "--output", str(tmp_path / "new"), *arguments])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_command_quantizes_on_procedural_pictures_and_keeps_what_it_is_told(tiny_folder, tmp_path, capsys):
    small = ["--patches", "1", "--patch-size", "64", "--rank", "2", "--keep", "mid_block*=w16a16", "decoder.*=w8a8"]
    command.main([str(tiny_folder), "--bits", "w3a4", *small, "--output", str(tmp_path / "new")])
    loaded = QArtSRPipeline.from_pretrained(tmp_path / "new")
    assert type(loaded.unet.mid_block.resnets[0].conv1) is torch.nn.Conv2d
    assert (
        loaded.vae.decoder.conv_in.spec.weight_bits == 8 and loaded.vae.encoder.mid_block.resnets[0].conv1.spec.weight_bits == 3
    )
    with pytest.raises(SystemExit, match="2"):
        command.main([str(tmp_path / "new"), "--output", str(tmp_path / "again")])
    assert "quantized already" in capsys.readouterr().err
