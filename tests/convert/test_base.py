"""What a base may be: diffusers folders of several ages, a Hub id, a single file. Every other thing is refused by name."""

import json
import re
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from ldm_names import original_names
from safetensors.torch import load_file, save_file
from stable_diffusion_base import TEXT_ENCODER, UNET, VAE, WORDS, adapted_forward
from transformers import CLIPTextConfig, CLIPTextModel

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.convert import single_file, stable_diffusion_2_1
from qartsr_pipeline.convert.conversion import read_base
from qartsr_pipeline.convert.single_file import Structure, read_single_file

STRUCTURE = Structure(UNET, VAE, TEXT_ENCODER, WORDS.index("<|startoftext|>"), WORDS.index("<|endoftext|>"))
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
X = torch.rand(1, 3, 32, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1


def assert_same_weights(found, expected):
    expected = expected.state_dict()
    found = found.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_read_in_float32_with_its_noise_schedule(made, base):
    tensors = {name: tensor.half() for name, tensor in load_file(base / UNET_FILE).items()}
    save_file(tensors, base / UNET_FILE, metadata={"format": "pt"})
    found = read_base(base)
    assert {p.dtype for model in (found.unet, found.vae, found.text_encoder) for p in model.parameters()} == {torch.float32}
    assert torch.equal(found.scheduler.alphas_cumprod, made.plain.scheduler.alphas_cumprod)
    assert (found.license, found.hub_id) == ("openrail++", None)


def test_the_empty_prompt_is_padded_as_in_stable_diffusion_2(made, base):
    embeds = read_base(base).prompt_embeds
    with torch.no_grad():
        assert torch.equal(embeds, made.plain.text_encoder(STRUCTURE.empty_prompt())[0])
    assert STRUCTURE.empty_prompt().tolist() == [[9, 10, 0, 0, 0, 0, 0]]


def test_attention_under_its_old_names(made, base):
    """Stable Diffusion 2.1-base's VAE is stored with query, key, value and proj_attn."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(base / VAE_FILE)
    for new, name in old.items():
        tensors = {key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value for key, value in tensors.items()}
    assert any("query" in key for key in tensors)
    save_file(tensors, base / VAE_FILE, metadata={"format": "pt"})
    assert_same_weights(read_base(base).vae, made.plain.vae)


def test_a_single_file_round_trip(made, tmp_path):
    """With what such a file holds besides: the last text layer, which is left out, and the training's noise schedule."""
    tensors = original_names(made.plain)
    tensors |= {"cond_stage_model.model.attn_mask": torch.zeros(7, 7), "betas": torch.zeros(1000)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "sd.safetensors")
    found = read_single_file(tmp_path / "sd.safetensors", structure=STRUCTURE)
    assert_same_weights(found.unet, made.plain.unet)
    assert_same_weights(found.vae, made.plain.vae)
    assert torch.allclose(found.scheduler.alphas_cumprod, made.plain.scheduler.alphas_cumprod)
    assert torch.allclose(found.prompt_embeds, read_base(made.base).prompt_embeds, atol=1e-6)
    assert found.text_encoder is None and found.tokenizer is None


def test_a_single_file_converts_without_any_network(made, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(single_file, "Structure", lambda: STRUCTURE)
    save_file({name: tensor.contiguous() for name, tensor in original_names(made.plain).items()}, tmp_path / "sd.safetensors")
    arguments = ["--base", str(tmp_path / "sd.safetensors"), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main(["convert", "osediff", *arguments]) == 0
    network = QArtSRPipeline.from_pretrained(tmp_path / "out").network()
    with torch.no_grad():
        result = network.decode(network.step(network.encode(X))).clamp(-1, 1)
    assert torch.allclose(result, adapted_forward(made.adapted, X), atol=1e-4)


def test_single_files_that_are_something_else(made, tmp_path):
    tensors = {name: tensor.contiguous() for name, tensor in original_names(made.plain).items()}
    path = tmp_path / "sd.safetensors"
    unet_key, vae_key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "first_stage_model.encoder.conv_in.weight"
    wrong = {
        "holds no UNet": {"x": torch.ones(1)},
        "holds no VAE": {key: value for key, value in tensors.items() if not key.startswith("first")},
        "holds no text encoder": {key: value for key, value in tensors.items() if not key.startswith("cond")},
        "down_blocks.0.resnets.0.conv1.weight": {key: value for key, value in tensors.items() if key != unet_key},
        "has in another shape encoder.conv_in.weight": tensors | {vae_key: torch.ones(2)},
        "lacks .*final_layer_norm": {key: value for key, value in tensors.items() if "ln_final" not in key},
    }
    for words, content in wrong.items():
        save_file(content, path)
        with pytest.raises(CheckpointError, match=words):
            read_single_file(path, structure=STRUCTURE)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        read_single_file(path, structure=STRUCTURE)
    path.rename(tmp_path / "sd.ckpt")
    with pytest.raises(CheckpointError, match="Pickled bases are refused"):
        read_base(tmp_path / "sd.ckpt")


def test_the_bundled_structure_is_that_of_stable_diffusion_2_1():
    """Numbers of parameters as published: 866 M, 84 M, 340 M."""
    with init_empty_weights():
        models = [UNet2DConditionModel(**stable_diffusion_2_1.UNET), AutoencoderKL(**stable_diffusion_2_1.VAE)]
        models.append(CLIPTextModel(CLIPTextConfig(**stable_diffusion_2_1.TEXT_ENCODER)))
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [865_910_724, 83_653_863, 340_387_840]
    tokens = Structure().empty_prompt()
    assert tokens.shape == (1, 77) and tokens[0, :3].tolist() == [49406, 49407, 0] and tokens[0, 2:].sum() == 0


def remove(name):
    return lambda base: shutil.rmtree(base / name) if (base / name).is_dir() else (base / name).unlink()


def configure(name, **changes):
    return lambda base: change_json(base / name, **changes)


def cut(name):
    return lambda base: (base / name).write_bytes((base / name).read_bytes()[:-10])


def lose_a_tensor(base):
    tensors = load_file(base / UNET_FILE)
    del tensors["conv_out.bias"]
    save_file(tensors, base / UNET_FILE, metadata={"format": "pt"})


def add_a_tensor(base):
    tensors = load_file(base / UNET_FILE)
    tensors["add_embedding.linear_1.weight"] = tensors["conv_out.bias"].clone()
    save_file(tensors, base / UNET_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, words",
    [
        (remove("unet"), "lacks unet/config.json"),
        (remove("scheduler/scheduler_config.json"), "lacks scheduler/scheduler_config.json"),
        (remove(VAE_FILE), "lacks the weights vae/diffusion_pytorch_model.safetensors"),
        (cut(UNET_FILE), "unet/diffusion_pytorch_model.safetensors in .* is truncated"),
        (lose_a_tensor, "lacks 1 tensors, such as conv_out.bias"),
        (add_a_tensor, "unet in .* has 1 tensors that its config.json has no place for, such as add_embedding.linear_1.weight"),
        (remove("tokenizer"), "no text_encoder and tokenizer.*--prompt-embedding"),
        (remove("tokenizer/merges.txt"), "lacks tokenizer/merges.txt"),
        (configure("unet/config.json", _class_name="UNet3DConditionModel"), "is a UNet3DConditionModel"),
        (configure("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}), "unet in .* is quantized"),
        (configure("unet/config.json", class_embed_type="identity"), "class_embed_type"),
        (configure("unet/config.json", block_out_channels=[16, 16]), "unet in .* cannot be loaded"),
        (configure("text_encoder/config.json", model_type="t5"), "only CLIP's is known"),
        (configure("text_encoder/config.json", num_attention_heads=5), "text_encoder in .* cannot be loaded"),
        (configure("scheduler/scheduler_config.json", prediction_type="v_prediction"), "v_prediction"),
        (configure("scheduler/scheduler_config.json", beta_schedule="nope"), "scheduler_config.json makes no schedule .*nope"),
        (configure("scheduler/scheduler_config.json", beta_start=None), "scheduler_config.json makes no schedule"),
    ],
)
def test_folders_that_cannot_be_a_base(base, checkpoint, tmp_path, capsys, change, words):
    change(base)
    arguments = ["--base", str(base), "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main(["convert", "osediff", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qartsr: error: ")]
    assert len(lines) == 1 and re.search(words, lines[0]), lines
    assert "unexpected" not in lines[0] and not (tmp_path / "out").exists()


def test_a_base_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder 'no/such/place'"):
        read_base("no/such/place")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="could not be downloaded from the Hub.*HF_HUB_OFFLINE.*local folder"):
        read_base("owner/name")


def test_a_base_from_the_hub_is_named_in_the_card(made, checkpoint, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, **options):
        asked.update(options, repo_id=repo_id)
        return str(made.base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    arguments = ["--base", "owner/copy", "--checkpoint", str(checkpoint), "-o", str(tmp_path / "out")]
    assert main(["convert", "osediff", *arguments]) == 0
    assert "base_model: owner/copy" in (tmp_path / "out" / "README.md").read_text()
    assert asked["repo_id"] == "owner/copy" and "unet/config.json" in asked["allow_patterns"]
    assert not any(pattern.startswith("*") or "fp16" in pattern for pattern in asked["allow_patterns"])


def test_a_plain_diffusers_folder(made, tmp_path):
    arguments = ["--base", str(made.base), "-o", str(tmp_path / "out"), "--timestep", "250", "--scale", "2"]
    assert main(["convert", "diffusers", *arguments]) == 0
    pipeline = QArtSRPipeline.from_pretrained(tmp_path / "out")
    assert_same_weights(pipeline.unet, made.plain.unet)
    assert_same_weights(pipeline.vae, made.plain.vae)
    assert (pipeline.config.timestep, pipeline.config.scale) == (250, 2)
    assert "license: openrail++" in (tmp_path / "out" / "README.md").read_text()
    assert main(["convert", "diffusers", *arguments[:2], "-o", str(tmp_path / "bad"), "--timestep", "1000"]) == 2
    assert not (tmp_path / "bad").exists()
