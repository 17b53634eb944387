"""osediff.pkl and a base become a folder that computes what the adapted model computes; bad checkpoints are refused by name."""

import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from stable_diffusion_base import adapted_forward

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.convert.conversion import convert_osediff
from qartsr_pipeline.convert.osediff import read_checkpoint

X = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(5)) * 2 - 1


def forward(pipeline, x, prompt=None):
    with torch.no_grad():
        network = pipeline.network(prompt)
        return network.decode(network.step(network.encode(x))).clamp(-1, 1)


def convert(base, checkpoint, output, prompt_embedding=None):
    convert_osediff(base, checkpoint, output, prompt_embedding)
    return QArtSRPipeline.from_pretrained(output)


def saved(content, path):
    torch.save(content, path)
    return path


def test_the_folder_computes_what_the_adapted_model_computes(made, checkpoint, tmp_path):
    pipeline = convert(made.base, checkpoint, tmp_path / "out")
    expected = adapted_forward(made.adapted, X)
    assert torch.allclose(forward(pipeline, X), expected, atol=1e-4)
    assert (adapted_forward(made.plain, X) - expected).abs().max() > 0.1, "the adapters matter"
    assert (pipeline.config.timestep, pipeline.config.scale) == (999, 4)
    assert all(p.dtype == torch.float32 for p in (*pipeline.unet.parameters(), *pipeline.vae.parameters()))
    assert not [name for name in pipeline.unet.state_dict() if "lora" in name or "base_layer" in name]


def test_a_prompt_goes_through_the_text_encoder(made, checkpoint, tmp_path):
    pipeline = convert(made.base, checkpoint, tmp_path / "out")
    expected = adapted_forward(made.adapted, X, "ab c")
    assert torch.allclose(forward(pipeline, X, "ab c"), expected, atol=1e-4)
    assert not torch.allclose(forward(pipeline, X), expected, atol=1e-3)
    assert torch.equal(forward(pipeline, X, ""), forward(pipeline, X))
    picture = Image.new("RGB", (8, 8), "orange")
    with_prompt = pipeline(picture, prompt="ab c", output_type="np").images
    assert not np.array_equal(with_prompt, pipeline(picture, output_type="np").images)


def test_from_the_command_line_to_a_picture(made, checkpoint, tmp_path, capsys):
    Image.new("RGB", (9, 7), "teal").save(tmp_path / "photo.png")
    out = tmp_path / "deep" / "folder"
    assert main(["convert", "osediff", "--base", str(made.base), "--checkpoint", str(checkpoint), "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "unet: adapters of 73 layers merged, 2 tensors replaced" in said and "takes prompts" in said
    assert main(["upscale", str(tmp_path / "photo.png"), "--model", str(out)]) == 0
    assert Image.open(tmp_path / "photo_x4.png").size == (36, 28)
    header = (out / "README.md").read_text().split("---")[1]
    for line in ("license: openrail++", "library_name: diffusers", "pipeline_tag: image-to-image", "base_model: stabilityai/"):
        assert line in header
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert not list(out.rglob("*.pkl")) and not list(out.rglob("*.bin"))


def test_what_is_quantized_of_it_leaves_the_text_encoder_behind(made, checkpoint, tmp_path):
    """It is of no use once the fixed prompt is folded into the weights, and larger than they are."""
    convert_osediff(made.base, checkpoint, tmp_path / "full", None)
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.png")
    options = ["--recipe", "maxmin", "--bits", "w8a8", "--evaluate", str(tmp_path), "--set", "images=1", "image_size=64"]
    assert main(["quantize", str(tmp_path / "full"), "--output", str(tmp_path / "run"), *options]) == 0
    made_of_it = tmp_path / "run" / "model"
    assert (tmp_path / "full" / "text_encoder").is_dir() and not (made_of_it / "text_encoder").exists()
    assert "license: openrail++" in (made_of_it / "README.md").read_text()
    with pytest.raises(ValueError, match="folded into the weights"):
        QArtSRPipeline.from_pretrained(made_of_it)(Image.open(tmp_path / "photo.png"), prompt="a")


def test_passionsr_layout(made, content, tmp_path):
    """Other entry names, any base weight beside the adapters, decoder adapters that PassionSR itself leaves out."""
    unet = content.pop("state_dict_unet") | {"conv_out.base_layer.bias": torch.full((4,), 0.25)}
    vae = content.pop("state_dict_vae") | {"decoder.conv_in.lora_A.default_decoder.weight": torch.ones(4, 4, 3, 3)}
    content |= {"unet_state_dict": unet, "vae_state_dict": vae, "vae_lora_decoder_modules": ["decoder.conv_in"]}
    embedding = torch.randn(1, 7, 12)
    shutil.copytree(made.base, tmp_path / "base", ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    checkpoint = saved(content, tmp_path / "osediff.ckpt")
    pipeline = convert(tmp_path / "base", checkpoint, tmp_path / "out", saved(embedding, tmp_path / "empty.pt"))
    assert torch.equal(pipeline.prompt_embedding.embedding, embedding)
    assert torch.equal(pipeline.unet.conv_out.bias, torch.full((4,), 0.25))
    reference = convert(made.base, saved(made.content, tmp_path / "osediff.pkl"), tmp_path / "reference")
    assert torch.equal(pipeline.unet.conv_in.weight, reference.unet.conv_in.weight)
    assert torch.equal(pipeline.vae.encoder.conv_in.weight, reference.vae.encoder.conv_in.weight)
    assert torch.equal(pipeline.vae.decoder.conv_in.weight, reference.vae.decoder.conv_in.weight)
    with pytest.raises(ValueError, match="`prompt` needs a text encoder"):
        pipeline(Image.new("RGB", (8, 8)), prompt="a")


def test_the_scaling_is_eight_over_the_rank(made, content, tmp_path):
    """peft's default `lora_alpha`, whatever the rank."""
    name = "mid_block.attentions.0.proj_in"
    state = {key: tensor for key, tensor in content["state_dict_unet"].items() if "lora" not in key}
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    state |= {f"{name}.lora_A.default_others.weight": a, f"{name}.lora_B.default_others.weight": b}
    content |= {"rank_unet": 2, "unet_lora_encoder_modules": [], "unet_lora_decoder_modules": []}
    content |= {"unet_lora_others_modules": [name], "state_dict_unet": state}
    pipeline = convert(made.base, saved(content, tmp_path / "osediff.pkl"), tmp_path / "out")
    difference = pipeline.unet.get_submodule(name).weight - made.plain.unet.get_submodule(name).weight
    assert torch.allclose(difference, 4 * b @ a, atol=1e-5)


def edit(entry, key, value):
    """A change of a checkpoint: `content[entry][key] = value`, or its removal."""

    def change(content):
        where = content if key is None else content[entry]
        where = dict(where) if isinstance(where, dict) else list(where)
        key_or_entry = entry if key is None else key
        if value is None:
            del where[key_or_entry]
        else:
            where[key_or_entry] = value
        return where if key is None else {**content, entry: where}

    return change


LORA = "conv_in.lora_A.default_encoder.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (edit("rank_vae", None, None), ["lacks rank_vae", "osediff.pkl"]),
        (edit("state_dict_unet", None, None), ["lacks state_dict_unet"]),
        (edit("unet_lora_others_modules", None, None), ["lacks unet_lora_others_modules"]),
        (edit("rank_unet", None, 8), ["wrongly shaped", f"{LORA}: (4, 4, 3, 3) instead of (8, 4, 3, 3)", "and"]),
        (edit("rank_unet", None, "four"), ["rank_unet must be a positive integer"]),
        (edit("rank_unet", None, 0), ["rank_unet must be a positive integer"]),
        (edit("unet_lora_encoder_modules", None, "conv_in"), ["unet_lora_encoder_modules must be a list"]),
        (edit("unet_lora_encoder_modules", 0, "conv_unknown"), ["another base model", "conv_unknown"]),
        (edit("unet_lora_encoder_modules", 0, "down_blocks.0"), ["another base model", "down_blocks.0"]),
        (edit("state_dict_unet", None, [1]), ["state_dict_unet must be a dictionary of tensors"]),
        (edit("state_dict_unet", LORA, 3), ["state_dict_unet must be a dictionary of tensors"]),
        (edit("state_dict_unet", 7, torch.ones(2)), ["keys of state_dict_unet", "one is 7"]),
        (edit("state_dict_unet", LORA, torch.ones(4, 4, 3, 3).bool()), [LORA, "not a plain tensor", "bool"]),
        (
            edit("state_dict_vae", "quant_conv.lora_B.default_encoder.weight", torch.ones(8, 4).to_sparse()),
            ["not a plain", "sparse"],
        ),
        (edit("state_dict_unet", LORA, None), ["missing", LORA]),
        (edit("state_dict_unet", "conv_in.base_layer.weight", None), ["missing: conv_in.base_layer.weight"]),
        (edit("state_dict_unet", "surplus.lora_A.weight", torch.ones(2)), ["not expected: surplus.lora_A.weight"]),
        (edit("state_dict_unet", "conv_out.base_layer.bias", torch.ones(4)), ["not expected: conv_out.base_layer.bias"]),
        (edit("state_dict_unet", LORA, torch.ones(4, 4, 1, 1)), ["wrongly shaped", "(4, 4, 1, 1) instead of (4, 4, 3, 3)"]),
        (edit("state_dict_unet", LORA, torch.full((4, 4, 3, 3), torch.nan)), ["not finite", LORA]),
        (edit("state_dict_vae", "quant_conv.lora_B.default_encoder.weight", None), ["state_dict_vae", "missing", "quant_conv"]),
    ],
)
def test_malformed_checkpoints_are_refused_by_name(made, content, tmp_path, change, words):
    path = saved(change(content), tmp_path / "osediff.pkl")
    with pytest.raises(CheckpointError) as caught:
        convert_osediff(made.base, path, tmp_path / "out", None)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["osediff.pkl"]


def test_every_flipped_byte_of_the_archives_entries_is_noticed(made, checkpoint):
    """`torch.load` compares no sums: a flipped byte in a tensor would become another weight."""
    sound, rng = checkpoint.read_bytes(), np.random.default_rng(0)
    plain = read_checkpoint(checkpoint)
    for place in rng.integers(0, len(sound), 40):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(rng.integers(8))
        checkpoint.write_bytes(damaged)
        try:
            found = read_checkpoint(checkpoint)
        except CheckpointError as error:
            assert str(checkpoint) in str(error) and ("again" in str(error) or "Take the file" in str(error))
            continue
        for part in ("unet", "vae"):  # a byte between entries, which nobody reads
            expected, state = getattr(plain, part).state, getattr(found, part).state
            assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_an_archive_that_would_fill_the_memory_is_not_read(tmp_path):
    path = tmp_path / "osediff.pkl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 30_000_000)
    with pytest.raises(CheckpointError, match="is compressed .*so it was not read.*Take the file"):
        read_checkpoint(path)


def test_files_that_are_no_checkpoint(made, checkpoint, tmp_path):
    files = {
        "none.pkl": (None, "There is no file"),
        "text.pkl": (b"no pickle", "not a checkpoint that PyTorch wrote"),
        "empty.pkl": (b"", "damaged"),
        "cut.pkl": (checkpoint.read_bytes()[:5000], "damaged"),
        "list.pkl": (saved([1, 2], tmp_path / "list.pkl").read_bytes(), "it holds a list, not a dictionary"),
    }
    for name, (data, words) in files.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(tmp_path / name)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("how", ["torch", "old torch", "plain pickle"])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(made, content, tmp_path, capsys, how):
    content["state_dict_unet"] = {LORA: Malicious(tmp_path / "hacked")}
    path = tmp_path / "osediff.pkl"
    if how == "plain pickle":
        path.write_bytes(pickle.dumps({"rank_unet": Malicious(tmp_path / "hacked")}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    arguments = ["--base", str(made.base), "--checkpoint", str(path), "--output", str(tmp_path / "out")]
    assert main(["convert", "osediff", *arguments]) == 2
    said = capsys.readouterr().err
    assert "is refused" in said and "Nothing of it was run" in said and "weights_only" not in said
    assert sorted(os.listdir(tmp_path)) == ["osediff.pkl"]
    (tmp_path / "empty.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "hacked")))
    assert main(["convert", "diffusers", *arguments[:2], *arguments[4:], "--prompt-embedding", str(tmp_path / "empty.pt")]) == 2
    assert not (tmp_path / "hacked").exists()


def test_prompt_embedding_files(made, checkpoint, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(7, 12)}, tmp_path / "ok.safetensors")
    pipeline = convert(made.base, checkpoint, tmp_path / "out", tmp_path / "ok.safetensors")
    assert torch.equal(pipeline.prompt_embedding.embedding, torch.ones(1, 7, 12))
    bad = {
        "missing.pt": "There is no file",
        "words.pt": "holds no prompt embedding",
        "batch.pt": "embeddings of 2 prompts",
        "nan.pt": "NaN",
        "width.pt": "width 13",
    }
    values = {
        "words.pt": {"a": 1},
        "batch.pt": torch.ones(2, 7, 12),
        "nan.pt": torch.ones(7, 12) / 0,
        "width.pt": torch.ones(7, 13),
    }
    for name, value in values.items():
        torch.save(value, tmp_path / name)
    for name, words in bad.items():
        with pytest.raises(CheckpointError, match=words):
            convert_osediff(made.base, checkpoint, tmp_path / "bad", tmp_path / name)
    assert not (tmp_path / "bad").exists()


def test_an_interruption_or_a_full_disk_leaves_nothing(made, checkpoint, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    before = sorted(os.listdir(tmp_path))

    def failing(error):
        def save(self, folder, **options):
            super(QArtSRPipeline, self).save_pretrained(str(folder))
            raise error

        return save

    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (SafetensorError("No space left on device"), OSError)):
        monkeypatch.setattr(QArtSRPipeline, "save_pretrained", failing(error))
        with pytest.raises(expected):
            convert_osediff(made.base, checkpoint, tmp_path / "out", None)
        assert sorted(os.listdir(tmp_path)) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="needs 0.02 GB, but .* has 0.00 GB free"):
        convert_osediff(made.base, checkpoint, tmp_path / "out", None)


def test_existing_folders_are_left_alone(made, checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileExistsError, match="not empty"):
        convert_osediff(made.base, checkpoint, tmp_path / "full", None)
    with pytest.raises(FileExistsError, match="is a file"):
        convert_osediff(made.base, checkpoint, checkpoint, None)
    with pytest.raises(NotADirectoryError, match="is a file"):
        convert_osediff(made.base, checkpoint, checkpoint / "deep" / "out", None)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert_osediff(made.base, checkpoint, tmp_path / "link", None)
    assert json.loads((tmp_path / "empty" / "model_index.json").read_text())["timestep"] == 999
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(CheckpointError, match="empty is a converted model already"):
        convert_osediff(tmp_path / "empty", checkpoint, tmp_path / "twice", None)
