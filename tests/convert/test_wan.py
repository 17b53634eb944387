"""One-step WAN models: diffusers folders, single files with WAN's names, adapters under three kinds of names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from safetensors.torch import load_file, save_file
from wan_names import original, transformer_name, vae_name, wan_autoencoder, wan_transformer

from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.checkpoint_files import CheckpointError, check_checkpoint
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.convert.wan import convert_wan, read_wan


@pytest.fixture(scope="module")
def transformer():
    return wan_transformer()


@pytest.fixture(scope="module")
def vae():
    return wan_autoencoder()


@pytest.fixture
def files(transformer, vae, tmp_path):
    """A transformer as ComfyUI has it, the autoencoder as WAN has it, and a prompt."""
    tensors = original(transformer.state_dict(), lambda key: f"model.diffusion_model.{transformer_name(key)}")
    save_file(tensors, tmp_path / "wan.safetensors")
    torch.save(original(vae.state_dict(), vae_name), tmp_path / "Wan2.1_VAE.pth")
    save_file({"prompt_embedding": torch.randn(1, 5, 16)}, tmp_path / "prompt.safetensors")
    return tmp_path


@pytest.fixture
def folder(transformer, vae, tmp_path):
    """As diffusers has WAN, with the prompt where DOVE has it."""
    base = tmp_path / "base"
    transformer.save_pretrained(base / "transformer")
    vae.save_pretrained(base / "vae")
    UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0).save_pretrained(
        base / "scheduler"
    )
    (base / "prompt_embeddings").mkdir()
    save_file({"prompt_embedding": torch.randn(5, 16)}, base / "prompt_embeddings" / "e3b0c442.safetensors")
    return base


def assert_same(found, expected):
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_single_files_become_a_folder_that_enlarges(files, transformer, vae, tmp_path, capsys):
    arguments = [
        "--base",
        files / "wan.safetensors",
        "--vae",
        files / "Wan2.1_VAE.pth",
        "--timestep",
        "200",
        "-o",
        tmp_path / "out",
    ]
    arguments += ["--prompt-embedding", files / "prompt.safetensors"]
    assert main(["convert", "wan", *map(str, arguments)]) == 0
    assert "try it: qartsr upscale clip.mp4 --model" in capsys.readouterr().out
    check_checkpoint(tmp_path / "out")
    pipe = LSGQuantVideoPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert_same(pipe.transformer, transformer)
    assert_same(pipe.vae, vae)
    assert pipe.config["timestep"] == 200 and pipe.scheduler.config["num_train_timesteps"] == 1000
    assert np.asarray(pipe(np.random.rand(2, 16, 16, 3), output_type="np").frames).shape == (1, 2, 64, 64, 3)
    assert "pipeline_tag: video-to-video" in (tmp_path / "out" / "README.md").read_text()


def test_a_diffusers_folder_with_a_stored_prompt(folder, transformer, vae, tmp_path):
    converted = convert_wan(folder, tmp_path / "out")
    pipe = LSGQuantVideoPipeline.from_pretrained(converted.folder)
    assert_same(pipe.transformer, transformer)
    assert_same(pipe.vae, vae)
    stored = load_file(folder / "prompt_embeddings" / "e3b0c442.safetensors")["prompt_embedding"]
    assert torch.equal(pipe.prompt_embedding(1)[0], stored) and pipe.config["timestep"] == 399


@pytest.mark.parametrize("names", ["diffusers", "wan", "kohya"])
def test_adapters_are_merged_whatever_they_are_called(files, transformer, tmp_path, names):
    adapters, expected = {}, {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    for layer in ("blocks.0.attn1.to_q", "blocks.1.attn2.to_out.0", "blocks.1.ffn.net.0.proj", "proj_out"):
        weight = expected[f"{layer}.weight"]
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        weight += (0.5 if names == "kohya" else 1.0) * up @ down
        theirs = transformer_name(f"{layer}.weight").removesuffix(".weight")
        name = {"diffusers": f"transformer.{layer}", "wan": f"diffusion_model.{theirs}"}.get(names)
        name = name or f"lora_unet_{theirs.replace('.', '_')}"
        kinds = ("lora_A", "lora_B") if names == "diffusers" else ("lora_down", "lora_up")
        adapters |= {f"{name}.{kinds[0]}.weight": down, f"{name}.{kinds[1]}.weight": up}
        if names == "kohya":
            adapters[f"{name}.alpha"] = torch.tensor(1.0)
        if names == "wan":
            adapters[f"{name}.diff_b"] = torch.ones(weight.shape[0])
            expected[f"{layer}.bias"] += 1
    save_file(adapters, tmp_path / "lora.safetensors")
    others = files / "Wan2.1_VAE.pth", tmp_path / "lora.safetensors", files / "prompt.safetensors"
    converted = convert_wan(files / "wan.safetensors", tmp_path / "out", *others)
    assert converted.merged["transformer"].layers == 4
    found = LSGQuantVideoPipeline.from_pretrained(converted.folder).transformer.state_dict()
    assert all((found[name] - tensor).abs().max() < 1e-5 for name, tensor in expected.items())
    adapters["transformer.blocks.7.attn1.to_q.lora_A.weight"] = torch.ones(2, 128)
    save_file(adapters, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="it names transformer.blocks.7.attn1.to_q.lora_A.weight .1 such"):
        convert_wan(files / "wan.safetensors", tmp_path / "other", *others)
    assert not (tmp_path / "other").exists()


def test_the_empty_prompt_is_computed_and_padded_with_zeros(folder):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, processors

    text = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    text.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "tokenizer")
    config = transformers.UMT5Config(vocab_size=3, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder = transformers.UMT5EncoderModel(config).eval()
    encoder.save_pretrained(folder / "text_encoder")
    (folder / "prompt_embeddings" / "e3b0c442.safetensors").unlink()
    embeds = read_wan(folder).prompt_embeds
    with torch.no_grad():
        expected = encoder(torch.tensor([[1]])).last_hidden_state
    assert embeds.shape == (1, 512, 16) and (embeds[:, :1] - expected).abs().max() < 1e-5 and not embeds[:, 1:].any()


def test_what_is_no_one_step_model_of_wan_is_refused(folder, files, tmp_path):
    tensors = load_file(files / "wan.safetensors")
    prefix = "model.diffusion_model."

    def changed(name, **changes):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}, path)
        return path

    vae, prompt = files / "Wan2.1_VAE.pth", torch.zeros(1, 5, 16)
    narrow = torch.ones(64, 128).to(torch.float8_e4m3fn)
    for base, arguments, said in (
        (files / "wan.safetensors", (None, prompt), "a transformer alone. Give WAN's autoencoder, too"),
        (files / "wan.safetensors", (vae, None), "holds no prompt. Give the embedding"),
        (files / "prompt.safetensors", (vae, prompt), "no transformer under WAN's original names"),
        (files / "wan.safetensors", (files / "prompt.safetensors", prompt), "no autoencoder under WAN's original names"),
        (changed("i2v", **{f"{prefix}img_emb.proj.0.weight": torch.ones(2)}), (vae, prompt), "image-to-video"),
        (changed("cut", **{f"{prefix}blocks.1.ffn.2.weight": None}), (vae, prompt), "lacks blocks.1.ffn.net.2.weight"),
        (changed("more", **{f"{prefix}blocks.1.extra": torch.ones(2)}), (vae, prompt), "has beyond what is known blocks.1.extra"),
        (changed("fp8", **{f"{prefix}head.head.weight": narrow}), (vae, prompt), "float8_e4m3fn. Give the file of 16 or 32 bits"),
        (tmp_path, (vae, prompt), "lacks transformer/config.json"),
    ):
        with pytest.raises(CheckpointError, match=said):
            read_wan(base, *arguments)
    save_file({"a": torch.zeros(2, 16)}, folder / "prompt_embeddings" / "second.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 embeddings. Name the one to use"):
        read_wan(folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "CogVideoXTransformer3DModel"}))
    with pytest.raises(CheckpointError, match="holds a CogVideoX model, such as DOVE"):
        read_wan(folder)
