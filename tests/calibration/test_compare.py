"""The comparison with a stand-in for the engine: what is made, what is kept, what the tables say; and once with the engine."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from calibration import compare
from calibration.comparison import learning_rate, methods, setting, table
from calibration.comparison.cells import CROP, most_restored, multiplications, stored_size
from calibration.comparison.methods import Cell, make_method, method_names
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.fingerprint import file_digests
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.recipe_files import load_recipe
from qartsr_pipeline.calibration.recipe_layers import Layer
from qartsr_pipeline.calibration.start.other_grids import layer_kinds
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.progress import Calibrated
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import prepare
from qartsr_pipeline.quantization.freeze import freeze_layer
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_pipeline

BEST_RATE = {"LSQ": 12.0, "QArtSR": 1.1}  # of the stand-in, as a factor
ERROR = {"MaxMin": 0.3, "LSQ": 0.2, "SVDQuant": 0.1, "QArtSR": 0.05}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with calibration photographs, one with others, the model and the model before TRQ."""
    folder = tmp_path_factory.mktemp("comparison")
    for number, picture in enumerate(DeadLeaves().sample(4, 64, np.random.default_rng(1))):
        path = folder / ("data" if number < 3 else "evaluate") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(path)
    build_tiny_pipeline().save_pretrained(folder / "model")
    build_tiny_pipeline(timestep=999).save_pretrained(folder / "model-t999")
    return folder


class Engine:
    """In the place of `engine.begin`: spoils the last layer, less so with the right learning rate."""

    def __init__(self):
        self.begun: list[tuple[str, int]] = []
        self.calls: list[tuple[str, int, int]] = []
        self.stop_at: int | None = None
        self.diverges_at: float | None = None

    def __call__(self, context: CalibrationContext) -> Run:
        self.begun.append((context.recipe.method, context.seed))
        return Run(self, context.pipeline, context.bits, context.seed)


class Run:
    """In the place of `qartsr_pipeline.calibration.training.engine.Run`."""

    def __init__(self, engine: Engine, pipeline, bits: tuple[int, int], seed: int):
        self.engine, self.pipeline, self.bits, self.seed = engine, pipeline, bits, seed
        self.weight = pipeline.vae.decoder.conv_out.weight
        prepare(pipeline.vae, QuantizationScheme(LayerScheme(16, 16, 1)))
        for layer in family_of(pipeline).layers(pipeline).values():
            layer.quantizing = False

    def parameters(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight.detach().clone()}

    def start_again(self, recipe, parameters, state) -> None:
        self.recipe, self.state = recipe, state
        self.weight.data.copy_(parameters["weight"])

    def complete(self) -> Calibrated:
        engine, recipe = self.engine, self.recipe
        engine.calls.append((recipe.method, recipe.steps, self.seed))
        self.state.write_text("in between")
        if len(engine.calls) == engine.stop_at:
            return Calibrated({}, stopped=True)
        error = ERROR[recipe.method] * (1 + 0.1 * self.seed) * 4 / self.bits[0]
        if recipe.stages:
            factor = recipe.stages[-1].lr / load_recipe(recipe.method.lower()).stages[-1].lr
            if factor == pytest.approx(engine.diverges_at):
                raise FloatingPointError("the loss is nan")
            error *= 1 + abs(np.log(factor / BEST_RATE[recipe.method]))
            if recipe.method == "QArtSR" and recipe.stages[0].order == "forward":
                error *= 1.2
        self.weight.data.mul_(1 + error)
        return Calibrated({}, {"stage": [error]}, layer_errors={"vae.x": error})


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(setting, "HELD_OUT", 1)
    monkeypatch.setattr(learning_rate, "begin", Engine())
    return learning_rate.begin


@pytest.fixture
def command(pictures, tmp_path):
    """Calls the command; the output folder is its attribute."""

    def call(*further: str, methods: str = "maxmin lsq qartsr", bits: str = "w4a4") -> None:
        paths = [pictures / "model", "--data", pictures / "data", "--evaluate", pictures / "evaluate"]
        chosen = ["--methods", *methods.split(), "--bits", *bits.split(), "--output", call.output]
        compare.main([str(a) for a in (*paths, *chosen, "--steps", "6", *further)])

    call.output = tmp_path / "out"
    return call


def cells(folder) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "cells").iterdir()}


def test_the_best_is_printed_first_and_finished_cells_are_not_made_again(command, engine, capsys):
    command(methods="maxmin lsq qartsr qartsr-forward", bits="w4a4 w2a2")
    made, printed = cells(command.output), capsys.readouterr().out
    assert set(made) == {
        f"{method}-{bits}-seed0" for method in ("maxmin", "lsq", "qartsr", "qartsr-forward") for bits in ("w4a4", "w2a2")
    }
    first = "Closest to full precision: **QArtSR**"
    assert printed.count(first) == 2 and printed.index("## W4A4") < printed.index("## W2A2")
    lines = [line.split("|") for line in printed[printed.index("## W4A4") :].splitlines() if line.startswith("| ")][2:5]
    assert [(line[1].strip(), line[2].strip()) for line in lines] == [("1", "QArtSR"), ("2", "LSQ"), ("3", "MaxMin")]
    values = [float(line[3]) for line in lines]
    assert values == sorted(values, reverse=True) and "forward order" in printed
    assert made["maxmin-w2a2-seed0"]["settings"]["recipe"]["method"] == "MaxMin"
    assert (command.output / "comparison.md").read_text() == printed[printed.index("# Quant") :].rstrip("\n") + "\n"
    ranking = json.loads((command.output / "comparison.json").read_text())["ranking"]["w4a4"]
    assert [line["method"] for line in ranking] == ["qartsr", "qartsr-forward", "lsq", "maxmin"]
    assert Image.open(command.output / "comparison-w4a4.png").size[0] == 6 * (64 + 8) - 8
    assert not (command.output / "states").exists()
    engine.calls.clear()
    command(methods="maxmin lsq qartsr qartsr-forward", bits="w4a4 w2a2")
    command("--table-only", methods="maxmin")
    assert not engine.calls and cells(command.output) == made


def test_the_learning_rate_is_chosen_on_held_out_patches_with_a_third_of_the_steps(command, engine, monkeypatch):
    measured = []
    real = learning_rate.held_out_loss
    monkeypatch.setattr(learning_rate, "held_out_loss", lambda *args: measured.append(real(*args)) or measured[-1])
    engine.diverges_at = 30.0
    command(methods="lsq qartsr maxmin")
    made = cells(command.output)
    losses = made["lsq-w4a4-seed0"]["learning_rate"]["held_out_losses"]
    assert list(losses) == ["0.3", "1", "3", "10", "30"] and losses["30"] is None  # beyond the end as long as it helps
    assert made["lsq-w4a4-seed0"]["learning_rate"]["bracketed"]
    assert made["lsq-w4a4-seed0"]["learning_rate"]["factor"] == 10.0
    assert made["qartsr-w4a4-seed0"]["learning_rate"]["factor"] == 1.0
    assert made["maxmin-w4a4-seed0"]["learning_rate"]["factor"] is None
    assert [steps for method, steps, _ in engine.calls if method == "LSQ"] == [2, 2, 2, 2, 2, 6]
    assert len(measured) == 7
    assert engine.begun.count(("LSQ", 0)) == 1  # all of these calibrations start from the same layers


def test_what_does_not_train_has_no_learning_rate(command, engine):
    command(methods="qartsr-start maxmin")
    assert [steps for _, steps, _ in engine.calls] == [0, 0]
    assert {cell["learning_rate"]["factor"] for cell in cells(command.output).values()} == {None}


def test_a_method_whose_training_diverges_does_not_end_the_comparison(command, engine, monkeypatch, capsys):
    monkeypatch.setattr(learning_rate, "SWEPT", (30.0,))
    engine.diverges_at = 30.0
    command(methods="lsq maxmin")
    assert list(cells(command.output)) == ["maxmin-w4a4-seed0"]
    printed = capsys.readouterr().out
    assert "lsq-w4a4-seed0 is left out of the tables: lsq-w4a4: training diverges" in printed and "**MaxMin**" in printed


def test_held_out_photographs_are_neither_calibrated_nor_evaluated_on(pictures, engine):
    folders = (str(pictures / "data"), str(pictures / "evaluate"))
    comparison = setting.prepare(setting.Sources({"": str(pictures / "model")}, *folders, output=pictures / "x"))
    assert len(comparison.held_out) == 1 and len(comparison.patches.images) == 2
    held_out = np.asarray(Image.open(comparison.held_out[0]))
    assert not any(np.array_equal(held_out, picture) for picture in comparison.patches.images)


def test_the_best_are_repeated_and_measured_on_the_model_before_trq(command, engine, pictures, capsys):
    command("--seeds", "2", "--model-t999", pictures / "model-t999", methods="maxmin lsq svdquant qartsr")
    made, printed = cells(command.output), capsys.readouterr().out
    repeated = {name for name, cell in made.items() if cell["seed"] == 1}
    assert repeated == {"qartsr-w4a4-seed1", "svdquant-w4a4-seed1", "lsq-w4a4-seed1"}
    before = {name for name, cell in made.items() if cell["model"]}
    assert before == {"qartsr-w4a4-t999-seed0", "svdquant-w4a4-t999-seed0", "lsq-w4a4-t999-seed0"}
    assert "(2)" in printed and "| no TRQ" in printed and "T = 999" in printed
    ranking = json.loads((command.output / "comparison.json").read_text())["ranking"]["w4a4"]
    main = next(line for line in ranking if line["method"] == "qartsr" and not line["model"])
    assert main["seeds"] == [0, 1] and main["spread"]["psnr_y"] > 0
    (command.output / "full-precision-t999.json").unlink()
    with pytest.raises(SystemExit, match="2"):
        command("--table-only")
    assert "full-precision-t999.json is missing" in capsys.readouterr().err


def test_a_cell_of_other_settings_is_an_error_that_names_it(command, engine, capsys):
    command(methods="lsq")
    engine.calls.clear()
    with pytest.raises(SystemExit, match="2"):
        command("--steps", "12", methods="lsq")
    said = capsys.readouterr().err
    assert "lsq-w4a4-seed0.json was made with other settings, recipe.steps is 6 there and 12 here" in said
    assert not engine.calls
    command("--steps", "12", methods="maxmin")  # which does not train
    path = command.output / "cells" / "maxmin-w4a4-seed0.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SystemExit, match="2"):
        command(methods="maxmin")
    assert "maxmin-w4a4-seed0.json cannot be read as a cell" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished_and_the_state_of_what_is_not(command, engine, capsys):
    engine.stop_at = 3
    with pytest.raises(SystemExit, match="130"):
        command(methods="maxmin lsq")
    assert set(cells(command.output)) == {"maxmin-w4a4-seed0"}
    assert [path.name for path in (command.output / "states").iterdir()] == ["sweep-lsq-w4a4-x1.pt"]
    assert "Continue with the same command" in capsys.readouterr().err
    command(methods="maxmin lsq")
    assert set(cells(command.output)) == {"maxmin-w4a4-seed0", "lsq-w4a4-seed0"}


def test_each_ablation_leaves_out_one_thing():
    main = load_recipe("qartsr")
    recipe = {name: make_method(name, main.steps).recipe for name in methods.ABLATIONS}
    assert len({str(each.to_dict()) for each in [main, *recipe.values()]}) == 1 + len(methods.ABLATIONS)
    assert all(sum(s.share for s in each.stages) == pytest.approx(1) for each in recipe.values())
    assert all(each.steps == (0 if name == "qartsr-start" else main.steps) for name, each in recipe.items())
    assert [s.order for s in recipe["qartsr-forward"].stages][0] == "forward"
    assert [[s.share for s in recipe[f"qartsr-{name}"].stages] for name in ("rpq", "no-et")] == [[0.3, 0.7], [1.0, 0.0]]
    for part, layer in (("branch", "branch_rank"), ("adapter", "adapter_rank"), ("smoothing", "smoothing")):
        changed = recipe[f"qartsr-no-{part}"]
        assert getattr(changed.layer, layer) in (0, "none") and all(part not in s.train for s in changed.stages)
        kept = {name: getattr(main.layer, name) for name in (layer, "branch_fit", "rounding")}
        assert replace(changed.layer, **kept) == main.layer


def test_passionsr_is_also_measured_at_the_bits_of_its_publication():
    both = [make_method(name, 6) for name in ("maxmin", "passionsr")]
    assert [cell.key for cell in compare.first_cells(both, ["w4a4"])] == [
        "maxmin-w4a4-seed0", "passionsr-w4a4-seed0", "passionsr-w8a8-seed0",
    ]  # fmt: skip
    assert len(compare.first_cells(both, ["w8a8"])) == 2


def test_methods_are_also_measured_with_what_others_have():
    same, main = make_method(methods.SAME_BUDGET, 6).recipe.layer, load_recipe("qartsr")
    assert (same.branch_rank, same.branch_budget) == (main.layer.branch_rank, main.budget.branch) and same.branch_budget > 0
    affine = make_method(methods.AFFINE_SAME_BUDGET, 6).recipe.layer
    assert affine == replace(same, group_grid="affine") and make_method(methods.AFFINE, 6).recipe.layer.branch_rank == 32
    assert make_method(methods.SAME_BITS, 6).recipe.budget == replace(main.budget, wider=0)
    for name, other in methods.WIDER.items():
        assert make_method(name, 6).recipe.layer == load_recipe(other).layer
        assert make_method(name, 6).recipe.budget == replace(main.budget, branch=None)
    assert make_method("maxmin", 6).recipe.steps == 0 and make_method("lsq", 6).recipe.steps == 6
    assert all(make_method(name, 6).name == name for name in method_names())


def one_layer(layer: Layer, scheme: LayerScheme) -> QArtSRPipeline:
    """A pipeline with one calibrating layer, a 1 x 1 convolution of 8 to 8 channels with bias."""
    pipeline = build_tiny_pipeline()
    for name in [name for name, _ in pipeline.vae.named_children()]:
        if name != "quant_conv":
            setattr(pipeline.vae, name, torch.nn.Identity())
    prepare(pipeline.vae, QuantizationScheme(scheme), kinds=layer_kinds(layer, False))
    return pipeline


@pytest.mark.parametrize("scheme", [LayerScheme(4, 4), LayerScheme(3, 4, 3), LayerScheme(8, 8, 2), LayerScheme(16, 8)])
def test_a_layers_size_is_that_of_the_tensors_in_the_folder(scheme, tmp_path):
    pipeline = one_layer(Layer(), scheme)
    size = stored_size(pipeline)
    save_file(freeze_layer(pipeline.vae.quant_conv).state_dict(), tmp_path / "layer.safetensors")
    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert size == {"megabytes": round(stored / 1e6, 4), "bits_a_weight": round(8 * stored / 64, 3)}


def test_a_simulated_grids_size_is_what_a_folder_would_store():
    smoothing_and_bias = 32 * 8 + 32 * 8
    grouped = stored_size(one_layer(Layer(group_size=3, activations="dynamic"), LayerScheme(4, 4)))
    bits = 8 * 8 * 4 + 32 * 8 * 3 + smoothing_and_bias + 32 + 8  # codes, three groups a row, offset, sign
    assert grouped["bits_a_weight"] == bits / 64
    affine = stored_size(one_layer(Layer(group_size=3, activations="dynamic", group_grid="affine"), LayerScheme(4, 4)))
    assert affine["bits_a_weight"] == (bits + 8 * 8 * 3 - 8) / 64  # a zero point a group; a factor for the offset, and no sign


def test_multiplications_of_branches_and_of_other_bits_are_counted():
    pipeline = one_layer(Layer(), LayerScheme(8, 8, 2))
    same, other = (multiplications(build_tiny_pipeline(), pipeline, bits) for bits in ("w8a8", "w4a4"))
    assert same == {"branch_cost": 2 * (8 + 8) / 64, "wider": 0.0} and other["wider"] == 1.0


def test_simulated_offsets_are_stored():
    smoothing_and_bias = 32 * 8 + 32 * 8
    shifted = stored_size(one_layer(Layer(offset="zero"), LayerScheme(4, 4)))
    bits = 8 * 8 * 4 + (32 + 8) * 8 + (32 + 8) + smoothing_and_bias + 32 * 8  # scales and zero points, and an offset a channel
    assert shifted["bits_a_weight"] == bits / 64


def test_what_is_shown_is_where_the_model_does_most():
    bicubic = torch.zeros(1, 3, 300, 400)
    restored = bicubic.clone()
    restored[..., 180:260, 240:300] = 1
    difference, (left, top, side) = most_restored(bicubic, restored)
    assert side == CROP and left <= 240 <= 300 <= left + side and top <= 180 <= 260 <= top + side
    assert difference == pytest.approx(80 * 60 / side**2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--methods", "gptq"], "invalid choice: 'gptq'"),
        (["--bits", "four"], "'four', expected a form such as w4a4"),
        (["--table-only"], "no finished cells"),
        (["--evaluate", "DATA"], "is among the photographs of --data"),
        (["--data", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_bad_arguments_are_errors_of_one_line(command, engine, pictures, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        command(*(str(pictures / "data") if argument == "DATA" else argument for argument in arguments))
    assert said in capsys.readouterr().err and not engine.calls


def test_the_model_must_not_have_seen_what_it_is_measured_on(command, engine, pictures, capsys):
    record = pictures / "model" / "training.json"
    record.write_text(json.dumps({"data": {"files": file_digests(sorted((pictures / "evaluate").iterdir()))}}))
    try:
        with pytest.raises(SystemExit, match="2"):
            command()
    finally:
        record.unlink()
    assert "3.png is one of the photographs that model was made with" in capsys.readouterr().err and not engine.calls


def test_a_full_disk_is_reported_without_an_option_that_is_not_there(command, engine, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit, match="2"):
        command(methods="maxmin")
    said = capsys.readouterr().err
    assert "full-precision.json" in said and "No space left" in said and "--resume" not in said


def test_too_few_photographs_to_hold_some_out(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        command()
    assert "has 3 photographs; more than 8 are needed" in capsys.readouterr().err


def test_cells_are_told_apart_by_everything_but_the_recipes_values():
    method = make_method("lsq", 6)
    assert len({Cell(method, "w4a4"), Cell(method, "w2a2"), Cell(method, "w4a4", 1), Cell(method, "w4a4", 0, "t999")}) == 4
    assert Cell(method, "w4a4", 1, "t999").key == "lsq-w4a4-t999-seed1"


def test_a_tables_ranks_by_truth_stand_beside_those_to_full_precision():
    def entry(label: str, to_full: float, truth: float) -> table.Entry:
        values = {"psnr_y_to_full_precision": [to_full, to_full + 0.2], "psnr_y": [truth, truth]}
        cell = {"learning_rate": {"factor": None}, "megabytes": 1.0, "bits_a_weight": 4.5, "seconds": 2.0}
        return table.Entry(label, label, "method", "w4a4", "", values, [cell, cell])

    entries = [entry("A", 30.0, 28.0), entry("B", 29.0, 28.5)]
    lines = table.table(entries).splitlines()
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["A", "B"]
    assert [line.split("|")[5].strip() for line in lines[2:]] == ["2", "1"]
    assert "30.10 ± 0.14 (2)" in lines[2]
    assert table.first_places(entries) == (
        "Closest to full precision: **A** (30.10 dB at 4.5 bits a weight, 1.00 dB before B);"
        " closest to the originals: **B** (28.50 dB at 4.5 bits a weight, 0.50 dB before A)."
    )


def test_with_the_engine_itself(command, monkeypatch, pictures, capsys):
    """Two methods, one of them in simulation only and one that trains, end to end."""
    monkeypatch.setattr(setting, "HELD_OUT", 1)
    monkeypatch.setattr(learning_rate, "SWEPT", (1.0,))

    def small(name: str):
        recipe = load_recipe(name)
        stages = tuple(replace(stage, patch=16, batch=1) for stage in recipe.stages)
        layer = replace(recipe.layer, branch_rounds=min(2, recipe.layer.branch_rounds))
        return replace(recipe, images=1, image_size=32, cached_batches=1, stages=stages, layer=layer)

    monkeypatch.setattr(methods, "load_recipe", small)
    command(methods="svdquant q_dm")
    made = cells(command.output)
    assert made["q_dm-w4a4-seed0"]["losses"]["mimicking"] and not made["svdquant-w4a4-seed0"]["losses"]
    assert all(cell["metrics"]["wavelet"]["psnr_y_to_full_precision"] > 10 for cell in made.values())
    shutil.rmtree(command.output)
