"""What is stored and what the configurations ask for are compared before anything is loaded, in bounded time and memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "quantization"))

from quantized_models import quantized_pipeline  # noqa: E402

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import CheckpointError, check_checkpoint, weight_files, write_checksums

W = "diffusion_pytorch_model.safetensors"
IMAGE = np.random.RandomState(0).randint(0, 255, (6, 5, 3)).astype("uint8")


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    write_checksums(path.parent.parent)


def change_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    folder = path.parent if path.name == "model_index.json" else path.parent.parent
    write_checksums(folder)


def peak_memory() -> int:
    """Kilobytes that this process has had at most; 0 where the system does not count them."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def refusal(folder: Path, **options) -> str:
    """The message with which a folder is refused; it has to end with what to do, and to come soon and without much memory."""
    start, memory = time.process_time(), peak_memory()
    with pytest.raises(CheckpointError) as caught:
        QArtSRPipeline.from_pretrained(folder, **options)
    assert time.process_time() - start < 1.0
    assert peak_memory() - memory < 200_000
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    assert any(word in message for word in ("Download", "remove", "Remove", "load it with", "Ask for", "Upgrade", "Load it with"))
    return message


@pytest.mark.parametrize("name", ["unet/conv_in.weight", "vae/quant_conv.bias", "prompt_embedding/embedding"])
@pytest.mark.parametrize("sums", [True, False])
def test_a_tensor_that_is_missing_is_never_invented(tiny_folder, name, sums):
    component, tensor = name.split("/")
    change_tensors(tiny_folder / component / W, lambda tensors: tensors.update(x=tensors.pop(tensor)))
    if not sums:
        (tiny_folder / "checksums.json").unlink()
    assert f"lack {tensor}, which {component}/config.json asks for" in refusal(tiny_folder)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.update(more=torch.zeros(2)), "hold more, for which unet/config.json leaves no place"),
        (lambda t: t.update({"conv_in.bias": torch.zeros(0)}), r"conv_in.bias as F32 [0], but unet/config.json asks for"),
        (
            lambda t: t.update({"conv_in.bias": t["conv_in.bias"].int()}),
            "conv_in.bias as I32 [16], but unet/config.json asks for a",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_is_named(tiny_folder, change, words):
    change_tensors(tiny_folder / "unet" / W, change)
    assert words in refusal(tiny_folder)


def test_names_of_attention_from_before_are_still_read(tiny_folder, tiny_pipeline):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in [name for name in tensors if "mid_block.attentions" in name]:
            for present, former in old.items():
                if f".{present}." in name:
                    tensors[name.replace(f".{present}.", f".{former}.")] = tensors.pop(name)

    change_tensors(tiny_folder / "vae" / W, rename)
    assert any("query" in name for name in load_file(tiny_folder / "vae" / W))
    found = QArtSRPipeline.from_pretrained(tiny_folder)(IMAGE, output_type="np").images
    assert np.array_equal(found, tiny_pipeline(IMAGE, output_type="np").images)


@pytest.mark.parametrize(
    "file, changes, words",
    [
        ("unet/config.json", {"block_out_channels": [10**9, 10**9]}, "a number above 1,000,000"),
        ("unet/config.json", {"layers_per_block": 10**5}, "'layers_per_block' = 100000, with which no model can be built"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 5000}, "more than 16 entries"),
        ("unet/config.json", {"block_out_channels": [900_000, 900_000]}, "the two do not belong together"),
        ("unet/config.json", {"act_fn": [0]}, "does not describe a UNet2DConditionModel that can be built"),
        ("vae/config.json", {"down_block_types": ["os"]}, "does not describe a AutoencoderKL that can be built"),
        ("vae/config.json", {"_class_name": "8"}, "describes a '8', which is no vae"),
        ("vae/config.json", {"scaling_factor": "0.18"}, "scaling_factor is '0.18', where 0.18215 is usual"),
        ("vae/config.json", {"scaling_factor": [1.0]}, "does not describe a AutoencoderKL that can be built"),
        ("unet/config.json", {"mid_block_scale_factor": "1"}, "does not describe a UNet2DConditionModel that can be built"),
        ("unet/config.json", {"flip_sin_to_cos": 1}, "does not describe a UNet2DConditionModel that can be built"),
        ("prompt_embedding/config.json", {"dim": []}, "does not describe a PromptEmbedding that can be built"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "a number above 1,000,000"),
        ("scheduler/scheduler_config.json", {"beta_start": [0.1]}, "makes no noise schedule"),
        ("scheduler/scheduler_config.json", {"beta_end": 900.0}, "not from 0 to 1"),
        ("model_index.json", {"unet": [["diffusers", "UNet2DConditionModel"]]}, "not a pair [library, class]"),
        ("model_index.json", {"unet": ["os", "UNet2DConditionModel"]}, "cannot use"),
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, "lists 'controlnet', which this release"),
        ("model_index.json", {"timestep": "250"}, "the timestep '250', not an integer"),
        ("model_index.json", {"scale": 0}, "the scale '0', not an integer from 1"),
    ],
)
def test_configurations_that_describe_no_model(tiny_folder, file, changes, words):
    change_json(tiny_folder / file, **changes)
    assert words in refusal(tiny_folder)


def test_the_timestep_is_the_folded_one(tmp_path):
    pipeline = quantized_pipeline()
    pipeline.save_pretrained(tmp_path)
    change_json(tmp_path / "model_index.json", timestep=500)
    assert "has the timestep 500, but the constants of timestep 250 are folded into the UNet" in refusal(tmp_path)
    with pytest.raises(ValueError, match="`timestep` is 500, but the constants of timestep 250 are folded.*Give timestep=250"):
        QArtSRPipeline(pipeline.unet, pipeline.vae, pipeline.scheduler, pipeline.prompt_embedding, timestep=500)


@pytest.mark.parametrize("component", ["unet", "vae"])
@pytest.mark.parametrize("scheme", [{}, False, "qartsr", {"quant_method": "qartsr", "format_version": 1}])
def test_a_quantization_config_that_is_none(tiny_folder, component, scheme):
    change_json(tiny_folder / component / "config.json", quantization_config=scheme)
    assert f"{component}/config.json in" in refusal(tiny_folder)


def test_a_missing_timestep_is_not_assumed(tiny_folder):
    index = json.loads((tiny_folder / "model_index.json").read_text())
    del index["timestep"]
    (tiny_folder / "model_index.json").write_text(json.dumps(index))
    write_checksums(tiny_folder)
    assert "lacks timestep, without which images would be wrong" in refusal(tiny_folder)
    assert QArtSRPipeline.from_pretrained(tiny_folder, timestep=250).config.timestep == 250


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", f"vae/{W}", "checksums.json"])
def test_what_is_no_regular_file_is_answered_at_once(tiny_folder, file):
    for make, words in (
        (os.mkfifo, "is a pipe"),
        (Path.mkdir, "is a folder"),
        (lambda path: path.symlink_to("nowhere"), "leads nowhere"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ):
        path = tiny_folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)
        assert words in refusal(tiny_folder)


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "levels deep"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"a": ' + b"9" * 9000 + b"}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_json_that_readers_fail_on(tiny_folder, content, words):
    (tiny_folder / "unet" / "config.json").write_bytes(content)
    assert words in refusal(tiny_folder)


@pytest.mark.parametrize("file", ["unet/config.json", f"unet/{W}", "checksums.json"])
def test_a_sparse_file_of_100_gigabytes_is_answered_at_once(tiny_folder, file):
    os.truncate(tiny_folder / file, 100_000_000_000)
    refusal(tiny_folder)


def test_a_header_that_claims_100_gigabytes_is_refused_without_torch_too(tiny_folder):
    path = tiny_folder / "prompt_embedding" / W
    header = json.dumps({"embedding": {"dtype": "U8", "shape": [10**11], "data_offsets": [0, 10**11]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 10**11)
    with pytest.raises(CheckpointError, match="only .* were ever written"):
        check_checkpoint(tiny_folder)


def test_a_pickle_is_read_in_no_place_and_with_no_argument(tiny_folder):
    weights = tiny_folder / "unet" / W
    tensors = {name: tensor * 0 for name, tensor in load_file(weights).items()}
    torch.save(tensors, tiny_folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="`use_safetensors` must be True"):
        QArtSRPipeline.from_pretrained(tiny_folder, use_safetensors=False)
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    weights.unlink()
    (tiny_folder / "checksums.json").unlink()
    for options in ({}, {"use_safetensors": True}, {"use_safetensors": None}):
        assert "refused and never executed" in refusal(tiny_folder, **options)
    listing = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "diffusion_pytorch_model.bin")}
    (weights.parent / f"{W}.index.json").write_text(json.dumps(listing))
    assert "refused and never executed" in refusal(tiny_folder)
    for path in weights.parent.glob("*.[bi]*"):
        path.unlink()
    (weights.parent / f"{W}.index.json").unlink(missing_ok=True)
    assert "load it with variant='fp16'" in refusal(tiny_folder)
    QArtSRPipeline.from_pretrained(tiny_folder, variant="fp16")


def test_a_changed_configuration_is_noticed_by_its_sum_and_line_ends_are_not(tiny_folder):
    path = tiny_folder / "vae" / "config.json"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"\n", b"\r\n"))  # as Git on Windows writes it
    QArtSRPipeline.from_pretrained(tiny_folder)
    path.write_bytes(text.replace(b'"scaling_factor": 0.5', b'"scaling_factor": 0.7'))
    assert "vae/config.json in" in refusal(tiny_folder)


def test_where_the_file_system_does_not_say_how_much_was_written_a_large_file_is_taken(tmp_path, monkeypatch):
    header = json.dumps({"embedding": {"dtype": "U8", "shape": [1 << 31], "data_offsets": [0, 1 << 31]}}).encode()
    path = tmp_path / W
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (1 << 31))
    status = SimpleNamespace(st_size=path.stat().st_size, st_blocks=0)
    monkeypatch.setattr(weight_files, "check_readable", lambda path, label: status)
    assert weight_files.check_safetensors(path, "large")["embedding"].shape == (1 << 31,)
