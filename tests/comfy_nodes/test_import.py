"""QArtSR Import through the node's function: a tiny Stable Diffusion and OSEDiff's checkpoint for it become a listed model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from convert.stable_diffusion_base import adapt, build_parts, save_base
from convert.wan_names import original, transformer_name, vae_name, wan_autoencoder, wan_transformer
from PIL import Image
from safetensors.torch import save_file

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
        ({"vae": "vae.safetensors"}, "vae is for wan alone, and kind is osediff"),
        ({"prompt_embedding": "gone.pt", "prompt": [[torch.zeros(1, 5, 16), {}]]}, "the prompt is given twice"),
        ({"prompt": [[torch.zeros(1, 5, 16), {}]] * 2}, "prompt has 2 parts"),
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


@pytest.fixture
def wan(comfy):
    """ComfyUI's models folder with a small WAN in single files, where ComfyUI has them."""
    import folder_paths

    folder = Path(folder_paths.models_dir)
    for kind in ("diffusion_models", "vae", "loras"):
        (folder / kind).mkdir(parents=True)
    transformer, autoencoder = wan_transformer(), wan_autoencoder()
    tensors = original(transformer.state_dict(), lambda key: f"model.diffusion_model.{transformer_name(key)}")
    save_file(tensors, folder / "diffusion_models" / "wan.safetensors")
    save_file(original(autoencoder.state_dict(), vae_name), folder / "vae" / "wan_vae.safetensors")
    down, up = torch.ones(1, 128), torch.full((128, 1), 0.01)
    adapters = {"blocks.0.self_attn.q.lora_down.weight": down, "blocks.0.self_attn.q.lora_up.weight": up}
    save_file(adapters, folder / "loras" / "steady.safetensors")
    return folder


WAN = {"kind": "wan", "base": "wan.safetensors", "checkpoint": "", "vae": "wan_vae.safetensors", "timestep": -1}


def test_a_model_for_clips_of_single_files_and_a_connected_prompt_enlarges_a_clip(nodes, wan, comfy):
    with torch.inference_mode():  # as ComfyUI's text encoder gives it
        prompt = [[torch.randn(1, 5, 16), {"pooled_output": None}]]
    text = run(nodes, **WAN, lora="steady.safetensors", prompt=prompt).args[0]
    assert "transformer: adapters of 1 layers merged" in text and "choose mine in QArtSR Load Video Model" in text
    assert [(value, total) for value, total, _ in comfy.progress] == [(0, 3), (1, 3), (2, 3)]
    model = nodes["QArtSRLoadVideoModel"].execute("mine", hub_id="", backend="auto", dtype="auto").args[0]
    pipeline = model.pipeline
    assert (pipeline.config.timestep, pipeline.config.scale) == (399, 4)
    assert torch.equal(pipeline.prompt_embedding(1), prompt[0][0])
    changed = wan_transformer().blocks[0].attn1.to_q.weight + 0.01
    assert torch.allclose(pipeline.transformer.blocks[0].attn1.to_q.weight, changed)
    with torch.inference_mode():
        info = nodes["QArtSRModelInfo"].execute(model).args[0]
        assert "transformer: float32, " in info and "timestep 399; chunks of 33 frames in tiles of 512; " in info


def test_what_a_single_file_of_wan_lacks_is_named_as_the_node_has_it(nodes, wan):
    for changes, said in (
        ({"vae": ""}, "wan.safetensors holds a transformer alone: give WAN's autoencoder as vae"),
        ({}, "holds no prompt: connect CLIP Text Encode"),
        ({"checkpoint": "osediff.pkl"}, "checkpoint is for osediff alone, and kind is wan"),
        ({"base": ""}, "the path of WAN's folder, or of its transformer's .safetensors file"),
        ({"vae": "gone.safetensors"}, "holds no prompt"),
        ({"vae": "gone.safetensors", "prompt": [[torch.zeros(1, 5, 16), {}]]}, "There is no .*gone.safetensors"),
        ({"prompt": [[torch.full((1, 5, 16), torch.nan), {}]]}, "NaN"),
        ({"prompt": [[torch.zeros(1, 5, 8), {}]]}, "`prompt_embedding` has tokens of width 8"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            run(nodes, **WAN | changes)
    assert not (wan / "qartsr").exists() or not list((wan / "qartsr").iterdir())
