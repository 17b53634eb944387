"""QArtSR Import through the node's function: a tiny Stable Diffusion and OSEDiff's checkpoint for it become a listed model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from convert.stable_diffusion_base import adapt, build_parts, save_base
from PIL import Image

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.convert.conversion import convert_osediff


@pytest.fixture
def models(comfy):
    """ComfyUI's models folder with `base/` and `osediff.pkl`; the checkpoints are in `qartsr/`."""
    import folder_paths

    folder = Path(folder_paths.models_dir)
    parts = build_parts(folder / "tables")
    save_base(parts, folder / "base")
    torch.save(adapt(copy.deepcopy(parts)), folder / "osediff.pkl")
    return folder


@torch.inference_mode()
def run(nodes, **changes):
    inputs = {"kind": "osediff", "base": "base", "checkpoint": "osediff.pkl", "name": "mine"}
    inputs |= {"prompt_embedding": "", "timestep": 999, "scale": 4}
    return nodes["QArtSRImport"].execute(**inputs | changes)


def test_a_checkpoint_becomes_what_convert_makes_of_it_and_can_be_quantized(nodes, models, tmp_path):
    output = run(nodes, base=f'"{models / "base"}"')
    text = output.args[0]
    assert output.ui == {"text": (text,)}
    assert "unet: adapters of" in text and f"written: {models / 'qartsr' / 'mine'}" in text
    for node in ("QArtSRLoadModel", "QArtSRQuantize"):
        assert "mine" in nodes[node].define_schema().inputs[0].options
    convert_osediff(models / "base", models / "osediff.pkl", tmp_path / "expected", None)
    image = Image.new("RGB", (8, 8), "orange")
    one, other = (QArtSRPipeline.from_pretrained(folder) for folder in (models / "qartsr" / "mine", tmp_path / "expected"))
    assert one(image).images[0] == other(image).images[0]


def test_a_plain_pipeline_keeps_its_timestep_and_scale(nodes, models):
    text = run(nodes, kind="diffusers", checkpoint="", name="plain", timestep=250, scale=2).args[0]
    config = QArtSRPipeline.from_pretrained(models / "qartsr" / "plain").config
    assert (config.timestep, config.scale) == (250, 2) and "merged" not in text


def test_a_cancel_stops_before_the_next_step_and_leaves_nothing(nodes, models, comfy):
    run(nodes, name="whole")
    assert [(value, total) for value, total, _ in comfy.progress] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    comfy.cancel_at = comfy.looked + 4  # before the adapters are merged: it is looked for once there, and once by the bar
    with pytest.raises(Exception) as raised:
        run(nodes)
    assert type(raised.value).__name__ == "InterruptProcessingException"
    assert [path.name for path in (models / "qartsr").iterdir()] == ["whole"]
    run(nodes)


def test_what_cannot_be_imported_is_explained_and_nothing_is_written(nodes, models):
    (models / "qartsr" / "there").mkdir(parents=True)
    for changes, said in (
        ({"name": "there"}, "exists already: it is left alone"),
        ({"name": "tiny-fp"}, "a model 'tiny-fp' already"),
        ({"base": "no/such"}, "There is no .*no.such. Give the path"),
        ({"base": " "}, "base is empty"),
        ({"checkpoint": ""}, "checkpoint is empty: .* or choose diffusers"),
        ({"kind": "diffusers"}, "checkpoint is for osediff alone"),
        ({"checkpoint": "base/README.md"}, "not a checkpoint that PyTorch wrote"),
        ({"prompt_embedding": "gone.pt"}, "There is no .*gone.pt"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            run(nodes, **changes)
    assert [path.name for path in (models / "qartsr").iterdir()] == ["there"]
    validate = nodes["QArtSRImport"].validate_inputs
    good = {"kind": "diffusers", "base": "base", "checkpoint": "", "name": "new"}
    assert validate(**good) is True and validate(**dict.fromkeys(good)) is True
    assert "kind 'onnx'" in validate(**good | {"kind": "onnx"})
    assert "expected a folder's name" in validate(**good | {"name": "../new"})
