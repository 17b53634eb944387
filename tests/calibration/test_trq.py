"""The search for the timestep that bears quantization: moving a model, retraining it, adapters, and the rule that picks."""

from __future__ import annotations

import copy
import json
import math
import signal

import numpy as np
import pytest
import torch

from calibration import trq as command
from calibration.teacher import export as export_teacher
from calibration.teacher import train as teacher
from calibration.teacher.model import new_model
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration import trq
from qartsr_pipeline.calibration.data.pairs import TrainingSet, procedural_pairs
from qartsr_pipeline.calibration.data.patches import PhotographPatches, list_photographs
from qartsr_pipeline.calibration.retraining.move_timestep import latents_for_fit, move_timestep
from qartsr_pipeline.calibration.retraining.one_step_model import LowRank, OneStepModel, add_adapters, merge_adapters
from qartsr_pipeline.calibration.retraining.settings import Rule, Settings, TimestepSearch, parse_phase
from qartsr_pipeline.calibration.retraining.trainer import Trainer
from qartsr_pipeline.calibration.training.progress import Callbacks, Stopped
from tiny_models import build_tiny_pipeline

SHORT = ["--phases", "latent:2:1e-4:32:2", "pixel:2:1e-4:32:2", "--fp32", "--held-out", "1"]


@pytest.fixture(scope="module")
def patches(photographs):
    return PhotographPatches(list_photographs(photographs))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few and small images, no training curves. The tiny model's attention would see 128 x 128 positions of 256 pixels."""
    monkeypatch.setattr("qartsr_pipeline.calibration.data.pairs.VALIDATION_SIDE", 64)
    monkeypatch.setattr("qartsr_pipeline.calibration.retraining.move_timestep.FIT_SIDE", 64)
    monkeypatch.setattr("qartsr_pipeline.calibration.retraining.trainer.plot_if_possible", lambda *_: False)
    for module in (trq, teacher):
        monkeypatch.setattr(module, "latents_for_fit", lambda *arguments: latents_for_fit(*arguments[:3], count=2))


@pytest.fixture
def model():
    return OneStepModel.from_pipeline(build_tiny_pipeline(timestep=100)).requires_grad_(False)


def error_of(moved, exact, latents):
    """Relative error of z_H."""
    pairs = [(moved.step(z), exact.step(z)) for z in latents]
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(b.square().sum()) for _, b in pairs))


@pytest.mark.parametrize("timestep, most", [(100, 0.0), (99, 1e-3), (20, 0.05), (999, 1.0)])
def test_moving_keeps_the_function_as_far_as_it_goes(model, patches, timestep, most):
    """Exact at the same timestep; near it the share of z_L is small; at 999 an unfitted model would be wrong 14 times over."""
    latents = latents_for_fit(model, patches, count=4)
    before, embedding = copy.deepcopy(model), time_embedding(model)
    move_timestep(model, timestep, latents)
    assert model.timestep == timestep and model.alpha_bar == float(model.scheduler.alphas_cumprod[timestep])
    assert error_of(model, before, latents) <= most
    assert torch.allclose(time_embedding(model), embedding, atol=1e-5), "the UNet shall see the old time embedding"
    unfitted = copy.deepcopy(before)
    unfitted.timestep, unfitted.alpha_bar = model.timestep, model.alpha_bar
    assert timestep == 100 or error_of(model, before, latents) < error_of(unfitted, before, latents) / 5


def time_embedding(model):
    return model.unet.time_embedding(model.unet.time_proj(torch.tensor([model.timestep])))


def test_channels_are_given_to_the_latent_where_the_fit_needs_them(patches):
    """The shipped shape, whose output convolution has channels to spare: what T = 999 amplifies comes through nearly exactly."""
    model = new_model(0, 100).requires_grad_(False)
    torch.nn.init.normal_(model.unet.conv_out.weight, std=0.01)
    latents = latents_for_fit(model, patches, count=2)
    before = copy.deepcopy(model)
    move_timestep(model, 999, latents)
    assert not torch.equal(model.unet.conv_in.weight, before.unet.conv_in.weight)
    assert error_of(model, before, latents) < 0.15
    assert (model.unet.conv_in.weight[:2] == 0).all(), "anchor channels stay empty"


def test_retraining_starts_at_a_folder_and_lowers_the_loss(tmp_path, monkeypatch, patches):
    build_tiny_pipeline(timestep=100).save_pretrained(tmp_path / "model")
    model = OneStepModel.from_pretrained(tmp_path / "model")
    assert model.timestep == 100 and float(model.scaling_factor) == 0.5
    move_timestep(model, 500, latents_for_fit(model, patches, count=4))
    frozen = copy.deepcopy(model.vae.state_dict())
    data = TrainingSet(patches, procedural_pairs(patches, 1, "bicubic"), {})
    settings = Settings(ema=0.5, every=40, bf16=False)
    trainer = Trainer(model, [parse_phase("latent:40:3e-3:32:4")], data, settings, tmp_path)
    losses = []
    step = Trainer._train_step
    monkeypatch.setattr(Trainer, "_train_step", lambda *arguments: losses.append(step(*arguments)) or losses[-1])
    assert trainer.run()
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    assert all(torch.equal(value, frozen[key]) for key, value in model.vae.state_dict().items()), "the VAE is frozen"


def test_started_run_resumes_and_exports(tmp_path, photographs, capsys):
    """--start is recorded by name only, and the exported folder is the moved and trained model."""
    build_tiny_pipeline(timestep=100).save_pretrained(tmp_path / "tiny")
    arguments = ["--start", str(tmp_path / "tiny"), "--timestep", "500", "--data", str(photographs), "--held-out", "1", "--fp32"]
    output = ["--output", str(tmp_path / "run")]
    teacher.main([*arguments, *output, "--phases", "latent:2:1e-3:32:2"])
    teacher.main(["--resume", *output, "--phases", "latent:2:1e-3:32:2", "pixel:2:1e-3:32:2"])
    export_teacher.export(tmp_path / "run" / "state.pt", tmp_path / "exported")
    exported = QArtSRPipeline.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    assert exported.config.timestep == 500 and exported.vae.config.scaling_factor == 0.5
    record = json.loads((tmp_path / "exported" / "training.json").read_text())
    assert record["arguments"]["start"] == "tiny" and record["phases_finished"] == 2 and record["timestep"] == 500
    with pytest.raises(SystemExit):
        teacher.main(["--start", "tiny-w4a4", "--procedural", "1", "--output", str(tmp_path / "other")])
    assert "tiny-w4a4 is quantized" in capsys.readouterr().err


def test_empty_channels_stay_empty(patches):
    model = OneStepModel.from_pipeline(build_tiny_pipeline())
    conv, norm = model.unet.conv_in, model.unet.conv_norm_out
    with torch.no_grad():
        for parameter in (conv.weight, norm.weight, norm.bias):
            parameter[0] = 0
    model = OneStepModel.from_pipeline(pipeline_around(model))
    x = latents_for_fit(model, patches, count=1)[0]
    model.step(x).square().mean().backward()
    for parameter in (conv.weight, norm.weight, norm.bias):
        assert not parameter.grad[0].any() and parameter.grad[1:].any()


def pipeline_around(model):
    pipeline = build_tiny_pipeline()
    pipeline.unet = model.unet
    return pipeline


def test_merged_adapters_equal_the_adapted_model(model, patches):
    before = copy.deepcopy(model)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    add_adapters(model, rank=2)
    assert torch.allclose(model(x), before(x), atol=1e-6), "adapters start at nothing"
    names = {name.rpartition(".parametrizations")[0] for name, part in model.named_modules() if isinstance(part, LowRank)}
    assert "unet.conv_in" not in names and "vae.encoder.conv_in" in names and not any("decoder" in name for name in names)
    assert not any("time_emb" in name for name in names)
    for part in model.modules():
        if isinstance(part, LowRank):
            torch.nn.init.normal_(part.up, std=0.05)
    adapted = model(x)
    assert not torch.allclose(adapted, before(x), atol=1e-2)
    merge_adapters(model)
    assert torch.allclose(model(x), adapted, atol=1e-5)
    assert model.state_dict().keys() == before.state_dict().keys()


def row(timestep, full_precision, bypass, z_error):
    return trq.Candidate(timestep, 1.0, full_precision, bypass, 27.0, 26.0, 30.0, 0.5, z_error)


def test_the_rule_picks_as_stated():
    rows = [
        row(1, 29.6, 29.0, 0.01),  # inert, although it is best in all else: refused
        row(20, 29.35, 27.5, 0.05),  # least error, but 0.15 dB below the best that works
        row(100, 29.42, 27.5, 0.07),
        row(250, 29.50, 27.5, 0.12),  # the best that works
        row(999, 28.0, 27.5, 0.9),
    ]
    assert trq.choose(rows, Rule()).timestep == 100
    assert trq.choose(rows, Rule(quality_margin=0.2)).timestep == 20
    assert trq.choose(rows, Rule(least_bypass_cost=0.5)).timestep == 1
    with pytest.raises(ValueError, match=r"at no timestep does bypassing the UNet cost 1 dB \(0.60 dB at 1, 0.50 dB at 999\)"):
        trq.choose([rows[0], rows[-1]], Rule())


def test_plain_quantization_errs_more_where_it_is_amplified(model, patches, tmp_path):
    """Of the same UNet eps errs the same at any timestep, z_H the more the larger the amplification."""
    held_out = procedural_pairs(patches, 1, "bicubic")
    model.unet.time_embedding.linear_2.weight.zero_()  # the timestep no longer reaches the UNet
    data = TrainingSet(patches, held_out, {})
    search = trq.TRQ("", data, tmp_path)
    low = search.measure(model)
    model.timestep, model.alpha_bar = 999, float(model.scheduler.alphas_cumprod[999])
    high = search.measure(model)
    assert low.amplification == pytest.approx(0.3443, abs=1e-3) and high.amplification == pytest.approx(14.6, abs=0.05)
    assert high.eps_error == pytest.approx(low.eps_error, rel=1e-3) and high.z_error > 1.2 * low.z_error > 0
    assert search.measure(copy.deepcopy(model)) == high
    eight = trq.TRQ("", data, tmp_path, TimestepSearch(bits=(8, 8))).measure(model)
    assert eight.z_error < high.z_error / 4 and eight.quantized_to_full_precision > high.quantized_to_full_precision + 10


@pytest.mark.parametrize("train", ["all", "adapters"])
def test_command_writes_table_plot_and_a_folder_that_loads(tmp_path, photographs, train, capsys):
    build_tiny_pipeline(timestep=100).save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "tiny"), "--timesteps", "100", "500", "--output", str(out), *SHORT, "--train", train]
    arguments += ["--data", str(photographs)]
    full = ["--full-phases", "pixel:2:1e-4:32:2"]
    with pytest.raises(SystemExit):
        command.main(arguments)  # an untrained UNet has learned nothing
    assert "at no timestep does bypassing the UNet cost 1 dB" in capsys.readouterr().err
    made = json.loads((out / "sweep.json").read_text())
    assert made["chosen"] is None and [row["timestep"] for row in made["rows"]] == [100, 500]
    stamp = (out / "t100" / "result.json").stat().st_mtime_ns

    command.main([*arguments, *full, "--least-bypass-cost", "-99"])
    made = json.loads((out / "sweep.json").read_text())
    assert made["chosen"] in (100, 500) and (out / "t100" / "result.json").stat().st_mtime_ns == stamp, "made again"
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG") and "| yes |" in (out / "sweep.md").read_text()
    pipeline = QArtSRPipeline.from_pretrained(out / "model")
    assert pipeline.config.timestep == made["chosen"]
    assert np.isfinite(pipeline(np.random.default_rng(0).random((16, 16, 3), np.float32), output_type="np").images).all()
    record = json.loads((out / "model" / "training.json").read_text())
    assert record["adapters"] == (train == "adapters") and record["timestep"] == made["chosen"]
    assert not list(out.rglob("state.pt")), "optimizer states"
    encoder = "vae.encoder.conv_in.weight"
    moved = not torch.equal(weight(out / "model", encoder), weight(tmp_path / "tiny", encoder).half().float())
    assert moved == (train == "adapters"), "adapters train the encoder too"

    with pytest.raises(SystemExit):
        command.main([*arguments, "--seed", "1"])
    assert "was made with other settings or data" in capsys.readouterr().err


def test_a_retrained_model_is_not_taken_for_another(tmp_path, patches):
    """Neither a finished model nor a state is continued with another model, timestep, phases, data or seed."""
    for seed in (0, 1):
        build_tiny_pipeline(seed, timestep=100).save_pretrained(tmp_path / f"{seed}" / "tiny")
    held_out, phases = procedural_pairs(patches, 1, "bicubic"), (parse_phase("latent:2:1e-4:32:2"),)

    def stage(model=0, data="a", **settings):
        training_set = TrainingSet(patches, held_out, {"data": {"count": 1, "sha256": data}})
        return trq.TRQ(str(tmp_path / f"{model}" / "tiny"), training_set, tmp_path, settings=Settings(bf16=False, **settings))

    def retrain(folder, by=None, timestep=99, phases=phases):
        by = by or stage()
        return by.retrain(by.model, timestep, phases, tmp_path / folder)

    stopping = stage()
    stopping.progress = Callbacks(lambda *_: True)
    with pytest.raises(Stopped):
        retrain("stopped", stopping)
    stamp = (retrain("done") / "training.json").stat().st_mtime_ns
    others = {
        "start is another": {"by": stage(model=1)},
        r"timestep is another \(99 there, 20 now\)": {"timestep": 20},
        "phases is another": {"phases": (parse_phase("latent:3:1e-4:32:2"),)},
        "data is another": {"by": stage(data="b")},
        "seed is another": {"by": stage(seed=1)},
    }
    for folder, tried in (("stopped", list(others)[1:2]), ("done", others)):
        for said in tried:
            with pytest.raises(ValueError, match=said):
                retrain(folder, **others[said])
    (tmp_path / "0").rename(tmp_path / "2")
    assert (retrain("done", stage(model=2)) / "training.json").stat().st_mtime_ns == stamp, "the same model from elsewhere"
    assert retrain("stopped", stage(model=2)).is_dir()


def weight(folder, name):
    return OneStepModel.from_pretrained(folder).state_dict()[name]


def test_stopped_sweep_goes_on_where_it_was(tmp_path, photographs, monkeypatch, capsys):
    build_tiny_pipeline(timestep=100).save_pretrained(tmp_path / "tiny")
    arguments = [str(tmp_path / "tiny"), "--timesteps", "100", "250", "--sweep-only", "--least-bypass-cost", "-99", *SHORT]
    arguments += ["--data", str(photographs)]
    command.main([*arguments, "--output", str(tmp_path / "once")])
    steps, step = [], Trainer._train_step

    def counted(self, phase, optimizer):
        steps.append(phase.name)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGINT)
        return step(self, phase, optimizer)

    monkeypatch.setattr(Trainer, "_train_step", counted)
    output = ["--output", str(tmp_path / "twice")]
    with pytest.raises(SystemExit) as stopped:
        command.main([*arguments, *output])
    assert stopped.value.code == 130 and "timestep 250" in capsys.readouterr().err and len(steps) == 6
    command.main([*arguments, *output])
    assert len(steps) == 8, "four steps at each of two timesteps"
    once, twice = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("once", "twice"))
    assert once == twice
