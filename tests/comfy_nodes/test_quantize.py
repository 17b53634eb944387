"""QArtSR Quantize through the node's function, in a thread and under inference mode as ComfyUI calls it, without ComfyUI."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

STEPS = 4
SMALL = ["images=2", "image_size=64", "cached_batches=1"]
SMALL_LAYERS = [
    "layer.branch_rank=2",
    "budget={}",
    "layer.adapter_rank=2",
    "layer.smoothing=ones",
    "layer.bounds=minmax",
    "layer.rounding=nearest",
]


def small(recipe):
    """The recipe with few and small pictures; that of QArtSR with low ranks and a quick start too."""
    from qartsr_pipeline.calibration.recipe_files import with_values

    stages = [f"stages.{index}.{key}" for index in range(len(recipe.stages)) for key in ("patch=32", "batch=1")]
    return with_values(recipe, [*SMALL, *stages, *(SMALL_LAYERS if recipe.method == "QArtSR" else [])])


@pytest.fixture
def models(comfy, tiny_folder, monkeypatch, tmp_path):
    """models/qartsr with the tiny model as `base`; recipes and the report's photograph are small."""
    import folder_paths

    from qartsr_pipeline.calibration import image_family, job

    folder = Path(folder_paths.models_dir) / "qartsr"
    shutil.copytree(tiny_folder, folder / "base")
    Image.open(image_family.SAMPLE).crop((0, 0, 64, 64)).save(tmp_path / "sample.png")
    real = job.load_recipe
    monkeypatch.setattr(image_family, "SAMPLE", tmp_path / "sample.png")
    monkeypatch.setattr(job, "load_recipe", lambda name: small(real(name)))
    return folder


def quantize(nodes, **changes):
    inputs = {"model": "base", "pictures": "", "recipe": "qartsr", "bits": "w4a4", "steps": STEPS, "seed": 0, "name": "mine"}

    def execute():
        with torch.inference_mode():
            return nodes["QArtSRQuantize"].execute(**inputs | changes)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(execute).result()


def weights(folder):
    return {path.relative_to(folder): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_makes_a_folder_that_loads_and_shows_the_comparison(nodes, comfy, models, tmp_path):
    from comfy_nodes.managed_model import load_model
    from comfy_nodes.model_folders import find_models

    (tmp_path / "input" / "photos").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (140, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "input" / "photos" / "one.png")
    output = quantize(nodes, pictures="photos", bits="w3a3")
    comparison, text = output.args
    assert comparison.shape[0] == 1 and comparison.shape[3] == 3 and 0 <= comparison.min() < comparison.max() <= 1
    assert output.ui["images"] is comparison and str(models / "mine") in text
    assert comfy.progress == [(step, STEPS, None) for step in range(1, STEPS + 1)]
    assert comfy.said[:2] == ["observe: 0 of 1", "observe: 1 of 1"] and comfy.said[-1].startswith(f"train: {STEPS} of {STEPS}")
    assert {line.partition(":")[0] for line in comfy.said} == {"observe", "set layers", "train"}
    assert len(comfy.prepared) > 3
    loaded = load_model("mine", find_models()["mine"], "auto", "auto").pipeline
    assert loaded.vae.encoder.mid_block.resnets[0].conv1.spec.weight_bits == 3
    record = json.loads((models / "mine" / "quantization.json").read_text())
    assert record["bits"] == "w3a3" and record["recipe"]["steps"] == STEPS and list(record["data"]["files"]) == ["one.png"]
    assert (models / "mine" / "report" / "index.html").is_file()
    assert listed(models) == [".runs", "base", "mine"] and listed(models / ".runs") == []
    assert "mine" not in nodes["QArtSRQuantize"].define_schema().inputs[0].options
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_cancelled_run_goes_on_to_the_same_checkpoint(nodes, comfy, models):
    quantize(nodes, name="straight", recipe="lsq")
    comfy.progress.clear()

    def cancel():
        with pytest.raises(Exception) as raised:
            quantize(nodes, recipe="lsq")
        assert type(raised.value).__name__ == "InterruptProcessingException"
        assert not (models / "mine").exists()
        comfy.cancel_at = comfy.cancel_at_step = None

    comfy.cancel_at = comfy.looked + 5  # while layers are observed
    cancel()
    assert not (models / ".runs" / "mine" / "state.pt").exists()
    comfy.cancel_at_step = 2
    cancel()
    assert [done for done, *_ in comfy.progress] == [1] and (models / ".runs" / "mine" / "state.pt").is_file()
    with pytest.raises(ValueError, match="unfinished run has the name 'mine', with other inputs: bits was w4a4, seed was 0"):
        quantize(nodes, recipe="lsq", seed=1, bits="w2a2")
    comfy.cancel_at_step = STEPS
    cancel()
    assert [done for done, *_ in comfy.progress] == [1, 3]
    quantize(nodes, recipe="lsq")
    one, other = weights(models / "straight"), weights(models / "mine")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[file][name]) for file in one for name, tensor in one[file].items())


def test_the_time_left_is_said_at_most_once_a_second(comfy, monkeypatch):
    from comfy_nodes.calibration_run import StepProgress, duration

    clock = [0.0]
    monkeypatch.setattr("comfy_nodes.calibration_run.time.monotonic", lambda: clock[0])
    progress = StepProgress()
    for done, now in ((0, 0.0), (1, 0.5), (2, 40.0), (4, 60.0)):
        clock[0] = now
        progress.preparing("set layers", done, 4)
    for step, now in ((1, 61.0), (2, 61.5), (3, 65.0)):
        clock[0] = now
        progress.stepped(step, 1000, 0.0)
    assert comfy.said == [
        *("set layers: 0 of 4", "set layers: 2 of 4, about 40 s left", "set layers: 4 of 4"),
        *("train: 1 of 1000", "train: 3 of 1000, about 33 min left"),
    ]
    assert [duration(seconds) for seconds in (5.2, 99, 150, 9000)] == ["5 s", "99 s", "2 min", "2.5 h"]


def test_what_cannot_be_made_is_explained_before_anything_runs(nodes, models, tmp_path, monkeypatch):
    validate = nodes["QArtSRQuantize"].validate_inputs
    good = {"model": "base", "recipe": "maxmin", "bits": "w8a8", "name": "new"}
    assert validate(**good) is True and validate(**dict.fromkeys(good)) is True
    assert "recipe 'nonesuch' is none of qartsr" in validate(**good | {"recipe": "nonesuch"})
    assert "bits 'w5a5'" in validate(**good | {"bits": "w5a5"})
    assert "no full-precision model 'tiny-w4a4'" in validate(**good | {"model": "tiny-w4a4"})
    for name in ("", ".hidden", "a/b", "..", "a\\b", "end."):
        assert "expected a folder's name" in validate(**good | {"name": name}), name
    for changes, said in (
        ({"name": "base"}, "base exists already: it is left alone. Choose another name"),
        ({"name": "tiny-w4a4"}, "a model 'tiny-w4a4' already"),
        ({"name": "../out"}, "expected a folder's name"),
        ({"model": "gone"}, "no full-precision model 'gone'"),
        ({"recipe": "nonesuch"}, "no recipe 'nonesuch'; there are"),
        ({"recipe": "maxmin"}, "steps is 4, but the recipe has no stages"),
        ({"pictures": "no-such-folder"}, "There is no .*input.no-such-folder. Give the path"),
        ({"pictures": str(models)}, "no image .* was found below"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            quantize(nodes, **changes)
    assert listed(models) in (["base"], [".runs", "base"]) and not any(models.glob(".runs/*"))


def test_the_lists_are_those_of_calibration(nodes):
    from comfy_nodes.quantize import BITS, RECIPES
    from qartsr_pipeline.calibration.arguments import recipe_names
    from qartsr_pipeline.calibration.recipe import parse_bits
    from qartsr_pipeline.calibration.recipe_files import load_recipe
    from qartsr_pipeline.quantization.scheme import LayerScheme

    layers = {name: load_recipe(name).layer for name in recipe_names()}  # those of tokens are for video models
    assert sorted(RECIPES) == [name for name, layer in layers.items() if layer.deployable and layer.activations != "token"]
    assert all(LayerScheme(*parse_bits(bits)) for bits in BITS)
