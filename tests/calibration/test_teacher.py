"""Training that can be stopped, resumed and exported."""

from __future__ import annotations

import errno
import json
import os
import signal

import numpy as np
import pytest
import torch

from calibration.teacher import export as export_teacher
from calibration.teacher import train as teacher
from calibration.teacher.model import TIMESTEP, build_models, new_model
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration import saving
from qartsr_pipeline.calibration.retraining import report as training_plots
from qartsr_pipeline.calibration.retraining.losses import PhaseLoss
from qartsr_pipeline.calibration.retraining.settings import parse_phase
from qartsr_pipeline.calibration.retraining.trainer import Trainer, load_state

BEGUN = ("--phases", "autoencoder:2:1e-3:32:4", "pixel:4:1e-3:32:4")  # the phases of `trained`


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_stopped_and_resumed_is_bit_identical_to_uninterrupted(
    trained, training_arguments, photographs, tmp_path, monkeypatch, capsys
):
    """Ctrl-C in the fourth step, which is in the second phase; the resumed run takes all its arguments from the state."""
    output, steps, train_step = str(tmp_path / "stopped"), [], Trainer._train_step

    def step_and_interrupt(self, phase, optimizer):
        steps.append(phase.name)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, phase, optimizer)

    monkeypatch.setattr(Trainer, "_train_step", step_and_interrupt)
    with pytest.raises(SystemExit) as stopped:
        teacher.main(["--data", str(photographs), "--output", output, *training_arguments])
    assert stopped.value.code == 130 and len(steps) == 4
    assert "saved at step 2 of phase 'pixel'" in (said := capsys.readouterr().err) and f"--resume --output {output}" in said
    teacher.main(["--resume", "--output", output])
    assert len(steps) == 6
    once, twice = (load_state(folder / "state.pt") for folder in (trained, tmp_path / "stopped"))
    for state in (once, twice):
        for row in state["history"]:
            del row["seconds"]
    assert same(once, twice)
    assert once["phase_index"] == 2 and len(once["history"]) == 2 and once["record"]["arguments"]["procedural"] == 0.5


def test_resuming_refuses_what_does_not_fit(trained, tmp_path, capsys):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.pt").write_bytes((trained / "state.pt").read_bytes()[:5000])
    for arguments, message in (
        (["--resume", "--output", str(trained), "--phases", "latent:2:1e-3:32:4"], "must begin with these"),
        (["--resume", "--output", str(tmp_path / "none")], "there is no training state"),
        (["--resume", "--output", str(tmp_path / "broken")], "damaged or of another kind"),
        (["--data", "x", "--output", str(trained)], "is there already: continue that run with --resume"),
        (["--output", str(tmp_path / "none")], "nothing to train on"),
        (["--procedural", "2", "--output", str(tmp_path / "none")], "number from 0 to 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            teacher.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("pixel:10", "has 2 parts"),
        ("pixel:ten:1e-3:32:4", "no number"),
        ("pixle:10:1e-3:32:4", "unknown name"),
        ("pixel:0:1e-3:32:4", "must be above 0"),
        ("pixel:10:nan:32:4", "must be above 0"),
        ("pixel:10:1e-3:40:4", "multiple of 16"),
    ],
)
def test_bad_phases_say_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=f"{message}.*expected NAME:STEPS:LR:PATCH:BATCH"):
        parse_phase(text)


@pytest.mark.parametrize("trouble", ["diverged", "disk full"])
def test_trouble_keeps_the_last_good_state(trained, trouble, monkeypatch, capsys):
    before = (trained / "state.pt").read_bytes()
    if trouble == "diverged":
        losses = iter((1.0, float("nan")))
        monkeypatch.setattr(
            PhaseLoss, "__call__", lambda self, name, model, *_: next(losses) * model.unet.conv_in.weight.square().sum()
        )
        expected = ("training diverged at step 1 of phase 'joint': the loss is nan", "lower learning rate")
    else:

        def full(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(saving.os, "fsync", full)
        expected = ("No space left on device. The file that was saved before is untouched", "teacher.train --resume --output")
    with pytest.raises(SystemExit) as stopped:
        teacher.main(["--resume", "--output", str(trained), *BEGUN, "joint:3:1e-3:32:4"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and all(text in said for text in expected)
    assert (trained / "state.pt").read_bytes() == before
    assert not list(trained.glob("*.tmp"))


def test_curves_are_drawn_where_matplotlib_is(trained, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    assert (trained / "training.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((trained / "history.json").read_text())
    assert {"model", "bicubic", "bypass", "autoencoder", "loss"} <= history[0].keys()
    assert training_plots.running_steps(history) == ([2, 6], [("autoencoder", 2), ("pixel", 6)])
    again = [{"phase": "pixel", "step": step} for step in (2, 4, 2)]
    assert training_plots.running_steps(again) == ([2, 4, 6], [("pixel", 4), ("pixel", 6)])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert training_plots.plot_if_possible(history, tmp_path / "none.png") is False


def test_exported_folder_is_the_averaged_model(trained, photographs, tmp_path, monkeypatch):
    folder = tmp_path / "exported"
    sizes = export_teacher.export(trained / "state.pt", folder)
    assert sizes["total"] >= sizes["unet"] + sizes["vae"] > 10_000
    state = load_state(trained / "state.pt")
    model = new_model(0, TIMESTEP)
    model.load_state_dict({key: value.half().float() for key, value in state["average"].items()})
    model.scaling_factor.copy_(state["average"]["scaling_factor"])
    pipeline = QArtSRPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipeline.config.timestep == 250 and pipeline.config.scale == 4
    assert pipeline.vae.config.scaling_factor == float(model.scaling_factor) != 1
    low = np.random.default_rng(0).random((32, 32, 3), np.float32)
    up = torch.nn.functional.interpolate(
        torch.from_numpy(low).permute(2, 0, 1)[None], size=(128, 128), mode="bicubic", antialias=True
    )
    with torch.no_grad():
        expected = (model(up * 2 - 1) / 2 + 0.5).clamp(0, 1)
    result = pipeline(low, color_fix=None, output_type="pt").images
    assert torch.allclose(result, expected, atol=1e-4)

    record = json.loads((folder / "training.json").read_text())
    assert record["data"]["count"] == 4 and record["held_out"] == ["picture_0.png"] and record["seed"] == 3
    assert [phase["name"] for phase in record["phases"]] == ["autoencoder", "pixel"] and record["phases_finished"] == 2
    assert str(photographs.parent) not in json.dumps(record), "a path of this machine"

    (folder / "README.md").write_text("a card")
    export_teacher.export(trained / "state.pt", folder)
    assert (folder / "README.md").read_text() == "a card"

    def fails(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(QArtSRPipeline, "save_pretrained", fails)
    with pytest.raises(OSError, match="No space left"):
        export_teacher.export(trained / "state.pt", folder)
    assert QArtSRPipeline.from_pretrained(folder) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"run", "exported"}, "left-overs"


def test_a_blend_lies_between_two_models(trained, tmp_path, tiny_folder, capsys):
    state, plain, other, blended = trained / "state.pt", tmp_path / "plain", tmp_path / "other", tmp_path / "blended"
    export_teacher.export(state, plain)
    pipeline = QArtSRPipeline.from_pretrained(plain, dtype=torch.float32)
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    with torch.no_grad():
        pipeline.unet.conv_in.bias += 1
    pipeline.save_pretrained(other)
    export_teacher.main([str(state), str(blended), "--blend", str(other), "0.25"])
    for name, value in QArtSRPipeline.from_pretrained(blended, dtype=torch.float32).unet.state_dict().items():
        assert torch.allclose(value, before[name] + (0.25 if name == "conv_in.bias" else 0), atol=1e-3), name
    record = json.loads((blended / "training.json").read_text())
    assert record["blend"] == {"other": "other", "share": 0.25}
    assert "validation" not in record and record["validation_before_blend"]["phase"] == "pixel"
    for arguments, message in (((other, "1.5"), "is a number from 0 to 1"), ((tiny_folder, "0.5"), "is no relative")):
        with pytest.raises(SystemExit):
            export_teacher.main([str(argument) for argument in (state, tmp_path / "none", "--blend", *arguments)])
        assert message in capsys.readouterr().err


def test_export_refuses_foreign_folders_and_states(trained, tmp_path, capsys):
    (tmp_path / "precious").mkdir()
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    for arguments, message in (
        ((trained / "state.pt", tmp_path / "precious"), "is no pipeline folder: it is left alone"),
        ((tmp_path / "other.pt", tmp_path / "new"), "is no training state"),
        ((tmp_path / "none.pt", tmp_path / "new"), "there is no training state"),
    ):
        with pytest.raises(SystemExit) as stopped:
            export_teacher.main([str(argument) for argument in arguments])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_shipped_shape_keeps_its_keys_and_size():
    model = new_model(0, TIMESTEP)
    keys = model.state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"vae", "unet", "prompt_embeds", "scaling_factor"}
    assert sum(value.numel() for value in model.state_dict().values()) * 2 < 12e6
    vae, unet, scheduler, prompt = build_models(0)
    assert prompt.shape == (1, 8, 64) and torch.equal(prompt, model.prompt_embeds)
