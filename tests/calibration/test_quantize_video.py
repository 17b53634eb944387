"""`quantize` of a video pipeline, end to end on tiny random models: simulated, deployed, saved, loaded, run by every backend."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from qartsr_pipeline import LSGQuantVideoPipeline, quantize, use_backend
from qartsr_pipeline.calibration.recipe import Recipe, Stage
from qartsr_pipeline.calibration.recipe_layers import Layer
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d, calibrating_layers, prepare
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.fold_wan import fold_wan
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers
from qartsr_pipeline.quantization.token_layers import TokenLinear
from tiny_models import build_tiny_video_pipeline

TOGETHER = Stage(name="together", modules="all", train=("branch", "bounds"), loss={"noise_l2": 1.0}, lr=0.01, patch=32, batch=1)
TOKENS = Layer(activations="token", rotation="hadamard", branch_rank=4, branch_fit=True, exponents=True)


def recipe(**changes) -> Recipe:
    values = {"method": "test", "source": "none", "layer": TOKENS}
    return Recipe(**values | {"images": 10, "image_size": 64} | changes)


def clips(count: int = 2, frames: int = 6, height: int = 64, width: int = 72) -> list[np.ndarray]:
    """Smooth shapes that drift, with some grain; uint8 (F, H, W, 3)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    made = []
    for _ in range(count):
        phase, grain = rng.random(3) * 6, rng.normal(0, 0.05, (height, width, 3))
        moved = [np.sin((rows * 0.3 + columns * 0.2 + time * 0.4)[..., None] + phase) * 0.3 + grain for time in range(frames)]
        made.append(((0.5 + np.stack(moved)).clip(0, 1) * 255).round().astype(np.uint8))
    return made


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    pipeline = build_tiny_video_pipeline()
    made = quantize(pipeline, "w4a4", clips(), recipe=recipe(), evaluation_data=clips(1, 5, 48, 48), output=output)
    return pipeline, made, output


def frames_of(pipeline: LSGQuantVideoPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(clips(1, 7, 16, 20)[0], output_type="np", color_fix=None).frames[0]


def test_a_folder_comes_out_that_loads_and_runs_on_every_backend(result):
    _, made, output = result
    assert made.finished and made.report.is_file() and made.output == output
    loaded = LSGQuantVideoPipeline.from_pretrained(output / "model")
    layers = {name: m for name, m in loaded.transformer.named_modules() if isinstance(m, DeployedLayer)}
    convolutions = [m for m in loaded.vae.modules() if isinstance(m, DeployedLayer)]
    assert len(layers) == 2 * 7 + 1 and len(made.layers) == len(layers) + len(convolutions)
    assert len(convolutions) > 10 and {layer.spec.carried_bits for layer in convolutions} == {8}
    specs = {name: layer.spec for name, layer in layers.items()}
    assert {spec.grid for spec in specs.values()} == {"token"}
    assert {name: spec.rotation for name, spec in specs.items() if spec.rotation} == {
        "blocks.0.ffn.net.2": 64,
        "blocks.1.ffn.net.2": 64,
    }
    assert specs["blocks.1.attn1.to_k"].rank == 4
    assert (specs["proj_out"].weight_bits, specs["proj_out"].activation_bits, specs["proj_out"].rank) == (8, 8, 0)
    wanted = frames_of(made.pipeline)
    with use_backend("reference"):
        assert np.array_equal(frames_of(loaded), frames_of(made.pipeline))
    assert np.abs(frames_of(loaded) - wanted).max() < 1e-3


def test_the_stored_configuration_says_version_2(result):
    config = json.loads((result[2] / "model" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2 and config["folding"] == {"timestep": 400, "tokens": 4}
    assert config["default"] | {"rank": 4, "grid": "token", "rotation": 0, "exponents": True} == config["default"]
    record = json.loads((result[2] / "model" / "quantization.json").read_text())
    assert record["data"]["clips"] == 2 and record["accounting"]["stated_bits"] == "w4a4"
    work = record["accounting"]["multiplications"]
    assert work["w8a8"] > 20 * work["w4a4"]  # the autoencoder's convolutions, stored under names of their own
    assert "LSGQuantVideoPipeline.from_pretrained" in (result[2] / "model" / "README.md").read_text()


def test_the_full_precision_pipeline_is_left_alone(result):
    pipeline, made, _ = result
    assert not any(isinstance(module, DeployedLayer) for module in pipeline.transformer.modules())
    assert np.array_equal(frames_of(pipeline), frames_of(build_tiny_video_pipeline()))
    assert np.abs(frames_of(made.pipeline) - frames_of(pipeline)).mean() < 0.05


def test_rows_compare_with_full_precision_and_with_time(result):
    bicubic, full, quantized = result[1].rows
    assert full.full_precision and not quantized.full_precision and bicubic.kind == "bicubic"
    assert "psnr_y_to_full_precision" in quantized.values and "temporal_error" in quantized.values


def test_six_bits_are_closer_and_the_autoencoder_may_stay_as_it_is(result, tmp_path):
    pipeline, made, _ = result
    kept = {"vae.*": "w16a16"}
    finer = quantize(pipeline, "w6a6", clips(), recipe=recipe(keep=kept), evaluation_data=clips(1, 5, 48, 48), output=tmp_path)
    loaded = LSGQuantVideoPipeline.from_pretrained(tmp_path / "model")
    assert not any(isinstance(module, DeployedLayer) for module in loaded.vae.modules())
    assert np.array_equal(frames_of(loaded), frames_of(finer.pipeline))
    errors = [{layer.name: layer.after for layer in run.layers if ".blocks." in layer.name} for run in (made, finer)]
    assert errors[0].keys() == errors[1].keys()
    assert sum(errors[1].values()) < 0.25 * sum(errors[0].values())


@torch.no_grad()
def test_what_is_simulated_is_what_is_deployed():
    pipeline = build_tiny_video_pipeline()
    transformer = pipeline.transformer
    folding = fold_wan(transformer, pipeline.config["timestep"], pipeline.prompt_embedding(1))
    scheme = QuantizationScheme(LayerScheme(4, 4, 3, "token", 16, True), folding=folding)
    layers = {name: layer for name, (layer, _) in quantizable_layers(transformer, scheme).items()}
    samples = observe(layers, lambda video: pipeline(video, output_type="np"), [clip[:, :32, :32] for clip in clips()])
    prepare(transformer, scheme, kinds=(TokenLinear, CalibratingConv2d))
    initialise(calibrating_layers(transformer), samples, Initialisation())
    assert any(layer.input_exponents.any() for layer in calibrating_layers(transformer).values())
    simulated = frames_of(pipeline)
    freeze(transformer, scheme)
    with use_backend("reference"):
        assert np.abs(frames_of(pipeline) - simulated).max() < 1e-4


def test_by_command_with_a_folder_of_clips(tmp_path, capsys):
    build_tiny_video_pipeline().save_pretrained(tmp_path / "tiny-video")
    for number, clip in enumerate(clips(2, 5), 1):
        (tmp_path / "clips" / str(number)).mkdir(parents=True)
        for index, frame in enumerate(clip):
            Image.fromarray(frame).save(tmp_path / "clips" / str(number) / f"{index}.png")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe().to_dict()), encoding="utf-8")
    options = ["--recipe", tmp_path / "small.yaml", "--data", tmp_path / "clips", "--output", tmp_path / "run"]
    assert main(["quantize", str(tmp_path / "tiny-video"), *map(str, options), "--device", "cpu"]) == 0
    assert "temporal error" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "run" / "model"), "--layers"]) == 0
    said = capsys.readouterr().out
    assert "W4A4 per token x 14" in said and "folded at T = 400" in said and "token, rotated by 64, exponents" in said
    assert main(["quantize", str(tmp_path / "run" / "model"), "--output", str(tmp_path / "again"), *map(str, options[:2])]) != 0
    assert "quantized already" in capsys.readouterr().err


def test_what_is_no_clip_is_refused_by_name():
    pipeline = build_tiny_video_pipeline()
    with pytest.raises(TypeError, match=r"data\[0\] is no clip"):
        quantize(pipeline, data=[Image.new("RGB", (64, 64))], recipe=recipe())
    with pytest.raises(ValueError, match="longest clip has 3 frames"):
        quantize(pipeline, data=clips(2, 3), recipe=recipe())
    with pytest.raises(ValueError, match="no clip is at least 96 pixels"):
        quantize(pipeline, data=clips(), recipe=recipe(image_size=96))
    with pytest.raises(ValueError, match="only image models are retrained"):
        quantize(pipeline, data=clips(), recipe=recipe(), timestep=300)


def assert_nearly_the_same_layers(pipeline, other):
    """Compared layer by layer: at 4 bits, a change of the last bit of an input is a change of the frames that can be seen."""
    for component in ("transformer", "vae"):
        layers, others = (dict(getattr(each, component).named_modules()) for each in (pipeline, other))
        for name, layer in layers.items():
            if isinstance(layer, DeployedLayer):
                for key, stored in layer.named_buffers():
                    before = others[name].get_buffer(key)
                    if stored.is_floating_point():
                        torch.testing.assert_close(stored, before, rtol=1e-3, atol=1e-5)
                    else:
                        assert (stored == before).float().mean() > 0.999, (name, key)


@pytest.mark.parametrize("rotation", ["hadamard", pytest.param("online", marks=pytest.mark.slow)])
def test_it_starts_from_a_quantized_folder_or_run_of_a_video_model(tmp_path, rotation):
    """Deployed layers become calibrating ones that compute the same, where the recipe changes weights."""
    layer = replace(TOKENS, rotation=rotation, residual=True)
    trained = replace(recipe(layer=layer, image_size=48), steps=3, stages=(TOGETHER,))
    pipeline, folder = build_tiny_video_pipeline(), tmp_path / "first" / "model"
    common = {"data": clips(1), "evaluation_data": clips(1, 1, 32, 32), "seed": 3}
    first = quantize(pipeline, recipe=trained, output=folder.parent, **common)
    for start in (folder, folder.parent):
        again = quantize(pipeline, recipe=replace(trained, steps=0), start=start, **common)
        assert again.record["start"]["steps_made"] == 3
        assert_nearly_the_same_layers(again.pipeline, first.pipeline)
    unrotated = replace(trained, layer=replace(layer, rotation="none"))
    with pytest.raises(ValueError, match="start from a folder of a recipe with the same layer.rotation"):
        quantize(pipeline, recipe=unrotated, start=folder, **common)
    if rotation == "hadamard":
        narrow = {"recipe": replace(trained, layer=replace(layer, branch_rank=2), steps=0), "bits": "w6a6"}
        started, fresh = (quantize(pipeline, **narrow, start=place, **common).pipeline for place in (folder, None))
        away = [np.abs(frames_of(each) - frames_of(first.pipeline)).mean() for each in (started, fresh)]
        assert away[0] < away[1], "other bits and ranks start close to it"


def test_a_run_that_started_from_a_folder_goes_on_after_a_stop(result, tmp_path):
    steps = replace(recipe(image_size=48), steps=4, stages=(TOGETHER,))
    arguments = {"data": clips(), "recipe": steps, "start": result[2] / "model", "evaluation_data": clips(1, 5, 48, 48)}
    whole = quantize(build_tiny_video_pipeline(), **arguments)
    stopped = quantize(build_tiny_video_pipeline(), output=tmp_path / "run", callback=lambda step, *_: step >= 2, **arguments)
    assert not stopped.finished
    resumed = quantize(build_tiny_video_pipeline(), output=tmp_path / "run", **arguments)
    assert resumed.record["loss"] == whole.record["loss"] and len(resumed.record["loss"]["together"]) == 4
    assert np.array_equal(frames_of(resumed.pipeline), frames_of(whole.pipeline))


def test_a_folder_of_images_or_in_full_precision_is_no_start(result, tmp_path):
    build_tiny_video_pipeline().save_pretrained(tmp_path / "full")
    for start in (tmp_path / "full", "tiny-w4a4"):
        with pytest.raises(ValueError, match="has no quantized layer transformer..*: start from a quantized folder of the same"):
            quantize(build_tiny_video_pipeline(), data=clips(), recipe=recipe(), start=start)
