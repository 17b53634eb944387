"""`quantize`, the public call: every kind of input, stopping and continuing, and what it leaves alone."""

from __future__ import annotations

import doctest
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_for_tests import small_recipe
from safetensors.torch import load_file

from qartsr_pipeline import QArtSRPipeline, quantize
from qartsr_pipeline.calibration import api, job, timestep
from qartsr_pipeline.calibration.api import _continued
from qartsr_pipeline.calibration.arguments import ARGUMENTS_NAME, Order, RunArguments
from qartsr_pipeline.calibration.data.pairs import TrainingData
from qartsr_pipeline.calibration.job import recorded_recipe
from qartsr_pipeline.calibration.recipe import Recipe
from qartsr_pipeline.calibration.recipe_files import load_recipe
from qartsr_pipeline.calibration.retraining.settings import Phase, Rule, TimestepSearch, parse_phase
from qartsr_pipeline.calibration.training.calibration_state import load_calibration
from qartsr_pipeline.whole_files import SavingError
from tiny_models import build_tiny_pipeline

STEPS = 4
PIXELS, LARGE = (np.full((side, side, 3), 7, np.uint8) for side in (16, 64))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of two small photographs."""
    folder = tmp_path_factory.mktemp("photographs")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        coarse = generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((96, 112), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def evaluated() -> list[np.ndarray]:
    """An image to measure on."""
    return [np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)]


def tiny(*changes: str):
    return small_recipe(f"steps={STEPS}", "images=2", *changes)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["parameters"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="module")
def from_folders(photographs, evaluated, tmp_path_factory):
    """The output folder of a run of the tiny model's folder on a folder of photographs, and its result."""
    base = tmp_path_factory.mktemp("from-folders")
    build_tiny_pipeline().save_pretrained(base / "tiny")
    output = base / "run"
    result = quantize(base / "tiny", "w4a4", photographs, recipe=tiny(), evaluation_data=evaluated, output=output, device="cpu")
    return output, result


def test_the_result_has_everything(from_folders):
    output, result = from_folders
    assert result.finished and result.output == output
    assert result.report == output / "report" / "index.html" and result.report.is_file()
    assert {layer.name.partition(".")[0] for layer in result.layers} == {"unet", "vae"}
    assert all(layer.before >= 0 and layer.after >= 0 for layer in result.layers)
    assert {row.kind for row in result.rows} == {"bicubic", "model"}
    assert result.record["bits"] == "w4a4" and sum(map(len, result.record["loss"].values())) == STEPS
    loaded = QArtSRPipeline.from_pretrained(output / "model")
    image = Image.new("RGB", (24, 16), "teal")
    assert np.array_equal(np.asarray(loaded(image).images[0]), np.asarray(result.pipeline(image).images[0]))


def test_a_pipeline_and_images_in_memory_give_what_folders_give_and_stay_as_they_are(
    from_folders, photographs, evaluated, tmp_path
):
    pipeline = build_tiny_pipeline()
    image = Image.new("RGB", (24, 16), "teal")
    before = np.asarray(pipeline(image).images[0])
    weights = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    images = [Image.open(path) for path in sorted(photographs.iterdir())]
    as_tensors = (torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images)  # can be read once
    seen: list[tuple[int, int]] = []
    result = quantize(
        pipeline,
        (4, 4),
        as_tensors,
        recipe=tiny(),
        evaluation_data=evaluated,
        output=tmp_path / "run",
        callback=lambda step, steps, loss: seen.append((step, steps)),
    )
    assert seen == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert equal(state(tmp_path / "run"), state(from_folders[0]))
    assert np.array_equal(np.asarray(pipeline(image).images[0]), before)
    assert equal(dict(pipeline.unet.state_dict()), weights)
    assert all(parameter.requires_grad for parameter in pipeline.unet.parameters())
    mine = {tensor.data_ptr() for tensor in pipeline.vae.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in result.pipeline.vae.state_dict().values()}
    result.pipeline.save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "run" / "model").rglob("*.safetensors"):
        assert equal(load_file(path), load_file(tmp_path / "saved" / path.relative_to(tmp_path / "run" / "model")))


def test_weights_held_in_16_bits_give_the_same_model_if_they_were_stored_so(photographs, evaluated, tmp_path):
    """A checkpoint stored in more bits loses only what the type cannot hold."""
    stored = build_tiny_pipeline()
    for model in (stored.unet, stored.vae):
        for layer in model.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.weight.data = layer.weight.data.half().float()
    small = {"recipe": tiny("steps=2"), "evaluation_data": evaluated, "device": "cpu"}
    results = {
        dtype: quantize(stored, "w4a4", photographs, output=tmp_path / str(dtype), dtype=dtype, **small)
        for dtype in ("float32", "float16", torch.bfloat16)
    }
    exact, same, near = results.values()
    assert equal(state(exact.output), state(same.output)) and not equal(state(exact.output), state(near.output))
    for path in (exact.output / "model").rglob("*.safetensors"):
        assert equal(load_file(path), load_file(same.output / path.relative_to(exact.output)))
    assert same.rows[-1].values == exact.rows[-1].values
    assert same.record["dtype"] == "float16" and "dtype" not in exact.record
    errors = [np.mean([layer.after for layer in each.layers]) for each in (exact, near)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05) and errors[1] != errors[0]


def test_dtypes_that_cannot_be_are_refused(photographs, tmp_path):
    with pytest.raises(ValueError, match="no dtype 'float8' for frozen weights; expected float32, bfloat16, float16"):
        quantize(build_tiny_pipeline(), data=photographs, dtype="float8", output=tmp_path / "run")
    assert not (tmp_path / "run" / ARGUMENTS_NAME).exists()


def test_a_stopped_run_continues_to_the_same_bits_and_with_no_other_arguments(from_folders, photographs, evaluated, tmp_path):
    def again(**changes):
        arguments = {"recipe": tiny(), "evaluation_data": evaluated, "output": tmp_path / "run"} | changes
        return quantize(build_tiny_pipeline(), "w4a4", photographs, **arguments)

    stopped = again(callback=lambda step, steps, loss: step == 2)
    assert not stopped.finished and stopped.pipeline is None and stopped.report is None
    with pytest.raises(ValueError, match="other arguments: seed is 0 there, not 1"):
        again(seed=1)
    with pytest.raises(ValueError, match="other arguments: recipe is"):
        again(recipe="lsq")
    assert again().finished
    assert equal(state(tmp_path / "run"), state(from_folders[0]))
    with pytest.raises(FileExistsError, match="holds something else"):
        again(output=photographs)


def test_without_data_and_output_nothing_is_kept(evaluated, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    result = quantize(
        build_tiny_pipeline(),
        "w8a8",
        recipe=small_recipe("images=2", name="svdquant"),
        evaluation_data=evaluated,
        progress=lambda what, done, total: said.append(what),
    )
    assert result.finished and result.pipeline is None  # this recipe's grid exists in simulation only
    assert result.output is None and result.report is None and result.layers and result.rows
    assert set(said) == {"observe", "set layers"}
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": "w5a4"}, "weight_bits is 5"),
        ({"bits": (16, 16)}, "quantizes nothing"),
        ({"recipe": "nonesuch"}, "no recipe 'nonesuch'"),
        ({"timestep": 1000}, "from 0 to 999"),
        ({"data": []}, "`data` is an empty list"),
        ({"model": "tiny-w4a4"}, "quantized already"),
        ({"perceptual": "eyes", "recipe": "qartsr"}, "no perceptual loss 'eyes'"),
        ({"degradation": "rain"}, "no degradation 'rain'"),
        ({"seed": -1}, "seed is -1"),
        ({"data": [PIXELS], "evaluation_data": [PIXELS + 1, PIXELS]}, r"evaluation_data\[1\] is among the images to calibrate"),
        ({"evaluation_data": [PIXELS, PIXELS.astype(float)]}, r"`evaluation_data\[1\]`"),
        ({"timestep": TimestepSearch(bits=(5, 4))}, "weight_bits is 5"),
        ({"data": [LARGE], "evaluation_data": [LARGE + 1, PIXELS]}, r"evaluation_data\[1\] has 16 x 16 pixels"),
        ({"data": [LARGE], "recipe": small_recipe("stages.1.patch=48")}, "no image is at least 80 pixels"),
        ({"data": [LARGE], "recipe": small_recipe("image_size=96")}, "no image is at least 96 pixels"),
    ],
)
def test_arguments_that_cannot_be_are_named(changes, said, tmp_path):
    arguments = {"model": build_tiny_pipeline(), "recipe": small_recipe("images=1"), "output": tmp_path / "run"} | changes
    with pytest.raises(ValueError, match=said):
        quantize(**arguments)
    assert not (tmp_path / "run").exists() or list((tmp_path / "run").iterdir()) == []


class _Captured(Exception):
    pass


def test_the_search_gets_what_was_asked_for_and_computes_where_the_pipeline_does(monkeypatch, tmp_path):
    seen = {}

    def captured(model, data, folder, search, settings, perceptual, device, progress):
        seen.update(search=search, device=device, held_out=len(data.held_out))
        raise _Captured

    monkeypatch.setattr(timestep, "TRQ", captured)
    monkeypatch.setattr(job, "default_device", lambda: pytest.fail("the pipeline has a device"))
    search = TimestepSearch((20,), held_out=1, bits=(8, 6))
    for asked in (search, 500):
        with pytest.raises(_Captured):
            quantize(build_tiny_pipeline(), timestep=asked, output=tmp_path / str(asked == 500))
        assert str(seen["device"]) == "cpu"
        assert asked != search or (seen["search"] == search and seen["held_out"] == 1)
    assert seen["search"].timesteps == (500,)


def test_retraining_at_a_timestep_needs_no_images_held_out():
    assert timestep.search_of(RunArguments(timestep="500", held_out=0)).timesteps == (500,)
    with pytest.raises(ValueError, match="0 images held out"):
        timestep.search_of(RunArguments(timestep="search", held_out=0))
    assert len(TrainingData(held_out=0).load().held_out) == 0


def test_a_pipeline_in_memory_is_written_whole_under_a_name_of_its_own(monkeypatch, tmp_path):
    def given(pipeline):
        return Path(timestep._model_for_retraining(Order(RunArguments(model="model"), tmp_path, model=pipeline), tmp_path))

    other_prompt = build_tiny_pipeline()
    other_prompt.prompt_embedding.embedding.data += 1
    pipelines = [build_tiny_pipeline(), build_tiny_pipeline(seed=1), build_tiny_pipeline(timestep=20), other_prompt]
    folders = [given(pipeline) for pipeline in pipelines]
    assert len(set(folders)) == 4 and all(folder.name.startswith("given-") for folder in folders)
    assert given(build_tiny_pipeline()) == folders[0]
    assert sorted(tmp_path.iterdir()) == sorted(folders)

    def killed(pipeline, folder):
        folder.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(QArtSRPipeline, "save_pretrained", killed)
    with pytest.raises(SavingError, match="No space left.*The disk is full: free some space"):
        given(build_tiny_pipeline(seed=2))
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    pipelines[0]._all_hooks = ["a hook"]  # as after enable_model_cpu_offload, which needs a GPU
    with pytest.raises(ValueError, match="the pipeline is offloaded"):
        given(pipelines[0])


def test_what_may_differ_when_a_run_is_continued():
    changed = {"model": "other", "data": "other", "evaluate": "other", "quality_margin": 0.2, "data_in_memory": "a hash"}
    for asked, said in (("keep", []), ("search", ["model", "data", "data_in_memory"])):
        arguments = RunArguments(timestep=asked)
        assert arguments.differing(replace(arguments, **changed)) == said


def test_a_run_from_before_lpips_was_the_default_continues_with_its_own_loss(tmp_path):
    (tmp_path / ARGUMENTS_NAME).write_text(RunArguments(perceptual="encoder").to_json())
    continued = _continued(Order(RunArguments(), tmp_path))
    assert continued.continues and continued.arguments.perceptual == "encoder"
    with pytest.raises(ValueError, match="perceptual is 'encoder' there, not 'lpips'"):
        _continued(Order(RunArguments(perceptual="lpips"), tmp_path))


@pytest.mark.slow
def test_a_pipeline_in_memory_is_retrained_at_another_timestep(evaluated, tmp_path):
    photographs = [
        np.asarray(Image.fromarray(image).resize((208, 208)))
        for image in np.random.default_rng(0).integers(0, 255, (2, 12, 12, 3), dtype=np.uint8)
    ]
    short = (Phase("latent", 1, 1e-4, 64, 1),)
    search = TimestepSearch((20, 400), short, short, held_out=1)
    with pytest.raises(ValueError, match="at no timestep does bypassing the UNet cost 1 dB"):
        quantize(build_tiny_pipeline(), data=photographs, timestep=search, recipe=tiny(), output=tmp_path / "run")
    search = TimestepSearch((20,), short, short, Rule(least_bypass_cost=-99), held_out=1)
    result = quantize(build_tiny_pipeline(), data=photographs, timestep=search, recipe=tiny(), evaluation_data=evaluated)
    assert result.pipeline.config.timestep == 20


@pytest.mark.slow
def test_the_example_in_its_documentation_runs():
    failures, examples = doctest.testmod(api)
    assert examples and not failures


def test_a_learning_rate_of_a_phase_is_kept_to_the_last_digit():
    kept = RunArguments(phases=("latent:1:1.23456789e-4:64:1",)).phases
    assert [parse_phase(text).lr for text in kept] == [1.23456789e-4]


def test_a_run_goes_on_with_the_recipe_that_it_was_begun_with(tmp_path):
    """As packages before this one wrote it: without keys that have come since, and with other defaults."""
    older = load_recipe("qartsr").to_dict() | {"steps": 7}
    del older["budget"], older["layer"]["rounding"], older["stages"][0]["rates"]
    entries = dict.fromkeys(("parameters", "stage_index", "turn_index", "step", "turns", "errors_before", "optimizer"))
    torch.save({"identity": {"recipe": older}, "losses": {}, **entries}, tmp_path / "state.pt")
    order = Order(RunArguments(steps=350), tmp_path, continues=True)
    recipe = recorded_recipe(order)
    assert recipe is not None and recipe.steps == 7 and not recipe.budget.is_set and recipe.layer.rounding == "nearest"
    assert recorded_recipe(replace(order, continues=False)) is None
    assert recorded_recipe(replace(order, arguments=RunArguments(recipe=older))) is None  # the arguments hold it themselves
    (tmp_path / "state.pt").unlink()
    assert recorded_recipe(order) is None
    with pytest.raises(ValueError, match="run with other seed, or of another"):
        _load_with(tmp_path, {"recipe": older, "seed": 0}, {"recipe": Recipe.from_dict(older).to_dict(), "seed": 1})
    _load_with(tmp_path, {"recipe": older, "seed": 0}, {"recipe": Recipe.from_dict(older).to_dict(), "seed": 0})


def _load_with(folder: Path, written: dict, identity: dict) -> None:
    entries = dict.fromkeys(("stage_index", "turn_index", "step", "losses", "turns", "errors_before", "optimizer"))
    torch.save({"identity": written, "parameters": {}, **entries}, folder / "state.pt")
    load_calibration(folder / "state.pt", {}, identity)
