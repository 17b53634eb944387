"""Checkpoint folders: every way in which one can be wrong has a message of its own, and nothing is executed on the way."""

import json
import os
import pickle
import shutil

import pytest

from qartsr_pipeline.arithmetic import FORMAT_VERSION
from qartsr_pipeline.checkpoint_files import (
    CheckpointError,
    check_checkpoint,
    fetch,
    integrity,
    is_quantized,
    write_checksums,
)
from qartsr_pipeline.cli.main import main

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMPONENTS = ("unet", "vae", "prompt_embedding")


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def flip_last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def rename_to_pickle(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def quantize(folder, **config):
    edit_json(folder / "unet/config.json", quantization_config=config)


DAMAGES = {
    "is not a checkpoint folder": lambda f: (f / "model_index.json").unlink(),
    "not valid JSON": lambda f: (f / "model_index.json").write_text("{"),
    "holds no JSON object": lambda f: (f / "vae/config.json").write_text("[]"),
    "checkpoint of StableDiffusionPipeline": lambda f: edit_json(f / "model_index.json", _class_name="StableDiffusionPipeline"),
    "lists no vae": lambda f: edit_json(f / "model_index.json", vae=None),
    "lacks the component folder prompt_embedding/": lambda f: shutil.rmtree(f / "prompt_embedding"),
    "lacks unet/config.json": lambda f: (f / "unet/config.json").unlink(),
    "lacks scheduler/scheduler_config.json": lambda f: (f / "scheduler/scheduler_config.json").unlink(),
    "lacks the weights vae/": lambda f: (f / "vae" / WEIGHTS).unlink(),
    "is a pickle where .* refused and never executed": rename_to_pickle,
    "'bitsandbytes'.* read by diffusers with bitsandbytes": lambda f: quantize(f, quant_method="bitsandbytes"),
    "'mystery'.*the library that wrote it": lambda f: quantize(f, quant_method="mystery"),
    "reads up to .*pip install --upgrade qartsr": lambda f: quantize(f, quant_method="qartsr", format_version=99),
    "format_version None": lambda f: quantize(f, quant_method="qartsr"),
    "truncated: it has": lambda f: cut(f / "unet" / WEIGHTS, -1),
    "truncated: it ends within its header": lambda f: cut(f / "unet" / WEIGHTS, 100),
    "is not a safetensors file": lambda f: cut(f / "unet" / WEIGHTS, 5),
    "SHA-256 is not the one": lambda f: flip_last_bit(f / "unet" / WEIGHTS),
    "checksums.json cannot be read": lambda f: (f / "checksums.json").write_text('{"../x": "0"}'),
    "which its checksums.json lists": lambda f: edit_json(f / "checksums.json", **{"unet/other.safetensors": "0"}),
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_damage_is_named(tiny_folder, expected):
    check_checkpoint(tiny_folder)
    DAMAGES[expected](tiny_folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        check_checkpoint(tiny_folder)
    assert "\n" not in str(caught.value)


def test_full_precision_and_quantized_folders_pass(tiny_folder):
    assert not is_quantized(tiny_folder)
    quantize(tiny_folder, quant_method="qartsr", format_version=FORMAT_VERSION)
    write_checksums(tiny_folder)
    check_checkpoint(tiny_folder)
    assert is_quantized(tiny_folder)


def test_without_checksums_nothing_is_compared(tiny_folder):
    flip_last_bit(tiny_folder / "unet" / WEIGHTS)
    (tiny_folder / "checksums.json").unlink()
    check_checkpoint(tiny_folder)


def test_new_checksums_describe_the_files_that_are_there(tiny_folder):
    flip_last_bit(tiny_folder / "unet" / WEIGHTS)
    sums = json.loads(write_checksums(tiny_folder).read_text())
    configs = ("model_index.json", "scheduler/scheduler_config.json", *(f"{name}/config.json" for name in COMPONENTS))
    assert set(sums) == {*configs, *(f"{name}/{WEIGHTS}" for name in COMPONENTS)}
    check_checkpoint(tiny_folder)
    assert not list(tiny_folder.glob(".checksums*"))


def test_a_process_hashes_a_file_once_until_it_changes(tiny_folder, monkeypatch, capsys):
    """`qartsr info` checks the folder before it imports torch, and loading it checks it again."""
    hashed, compute = [], integrity._computed_sum
    monkeypatch.setattr(integrity, "_known_sums", {})
    monkeypatch.setattr(integrity, "_computed_sum", lambda path: hashed.append(path) or compute(path))
    assert main(["info", str(tiny_folder)]) == 0
    weights = sorted(tiny_folder.glob("*/*.safetensors"))
    assert sorted(hashed) == sorted([*weights, *tiny_folder.glob("**/*[xg].json")]) and len(hashed) == 8
    os.utime(weights[0])
    check_checkpoint(tiny_folder)
    assert hashed[8:] == [weights[0]]
    flip_last_bit(weights[1])
    with pytest.raises(CheckpointError, match="SHA-256 is not the one"):
        check_checkpoint(tiny_folder)


def test_sharded_weights_need_their_listing_and_every_part(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path, max_shard_size="100KB")
    parts = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))
    assert len(parts) > 1
    check_checkpoint(tmp_path)
    (tmp_path / "checksums.json").unlink()
    parts[0].rename(tmp_path / "part")
    with pytest.raises(CheckpointError, match=f"lacks unet/{parts[0].name}, which"):
        check_checkpoint(tmp_path)
    (tmp_path / "part").rename(parts[0])
    (tmp_path / "unet" / f"{WEIGHTS}.index.json").unlink()
    with pytest.raises(CheckpointError, match="lacks the weights"):
        check_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_is_never_executed(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tiny_folder / "unet" / WEIGHTS).unlink()
    (tiny_folder / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    only_pickle = tmp_path / "only"
    only_pickle.mkdir()
    (only_pickle / "model.ckpt").write_bytes(pickle.dumps(Bomb()))
    for place in (tiny_folder, only_pickle, only_pickle / "model.ckpt"):
        with pytest.raises(CheckpointError, match="refused and never executed"):
            check_checkpoint(place)
    assert not (tmp_path / "executed").exists()


def test_a_component_folder_is_told_from_the_whole(tiny_folder):
    with pytest.raises(CheckpointError, match="give the folder above"):
        check_checkpoint(tiny_folder / "unet")


def test_paths_are_told_from_hub_ids(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert fetch(tiny_folder) == tiny_folder
    for name in ("./none", "none", "a/b/c", "~/none", "models/none", "../none"):
        with pytest.raises(CheckpointError, match="There is no folder"):
            fetch(name)


@pytest.mark.parametrize(
    "kind, expected",
    {
        "GatedRepoError": "is gated",
        "RepositoryNotFoundError": "no repository 'someone/model'",
        "RevisionNotFoundError": "no revision 'v2'",
        "LocalEntryNotFoundError": "could not be downloaded.*local folder",
    }.items(),
)
def test_hub_refusals(monkeypatch, kind, expected):
    import huggingface_hub
    from huggingface_hub import errors

    error_class = getattr(errors, kind)

    def refuse(hub_id, *, allow_patterns, **options):
        assert hub_id == "someone/model" and not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        raise error_class.__new__(error_class)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=expected):
        fetch("someone/model", revision="v2")


def test_hub_unreachable(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        fetch("someone/model", cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="not in the local cache"):
        fetch("someone/model", cache_dir=tmp_path, local_files_only=True)
