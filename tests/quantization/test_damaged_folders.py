"""Weights and quantization_config that do not belong together: each says so, none loads half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from quantized_models import quantized_pipeline
from safetensors.torch import load_file, save_file

LAYER = "mid_block.resnets.0.conv1"  # by the overrides 3 bits, 6 bits, rank 1
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    quantized_pipeline().unet.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "unet"))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet2DConditionModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["weight_packed", "weight_zero_point", "input_scale", "smooth", "branch_up", "bias"])
def test_a_missing_tensor_is_named(folder: Path, name: str):
    change_tensors(folder, lambda tensors: tensors.pop(f"{LAYER}.{name}"))
    assert_refused(folder, f"lacks 1 tensors.*{LAYER}.{name}.*incomplete")


def test_a_missing_folded_constant_is_named(folder: Path):
    change_tensors(folder, lambda tensors: tensors.pop("mid_block.resnets.0.time_emb_proj.value"))
    assert_refused(folder, "mid_block.resnets.0.time_emb_proj.value")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight_packed", lambda t: t[:, :-1].contiguous()),
        ("weight_packed", lambda t: t.to(torch.int32)),
        ("weight_scale", lambda t: t.half()),
        ("smooth", lambda t: torch.cat([t, t])),
        ("branch_up", lambda t: t.float()),
        ("input_scale", lambda t: t.view(1)),
    ],
)
def test_wrong_shapes_and_dtypes_are_named(folder: Path, name: str, change):
    def apply(tensors: dict) -> None:
        tensors[f"{LAYER}.{name}"] = change(tensors[f"{LAYER}.{name}"])

    change_tensors(folder, apply)
    assert_refused(folder, f"{LAYER}.{name} is .*expected.*do not belong to this quantization_config")


def _override(pattern: str, **changes):
    def change(config: dict) -> None:
        for pair in config["overrides"]:
            if pair[0] == pattern:
                pair[1].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_override("*.conv1", weight_bits=4), "weight_packed is .*do not belong"),
        (_override("*.conv1", weight_bits=8), "holds .*weight_zero_point.*leaves no place"),
        (_override("*.conv1", weight_bits=5), "weight_bits is 5"),
        (_override("*.conv1", activation_bits=16), "holds .*input_scale.*leaves no place"),
        (_override("*.conv1", rank=0), "holds .*branch_down.*leaves no place"),
        (lambda config: config.update(format_version=2), "format_version 2.*Upgrade"),
        (lambda config: config.update(rotation="hadamard"), "unknown keys.*rotation"),
        (lambda config: config.update(folding=None), "lacks .* tensors"),
        (lambda config: config.pop("default"), "default"),
        (lambda config: config.update(quant_method="qartsr2"), "qartsr2"),
    ],
)
def test_an_edited_config_is_refused(folder: Path, change, message: str):
    change_config(folder, change)
    assert_refused(folder, message)


def test_a_config_without_quantization_finds_no_float_weights(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception):  # noqa: B017 - diffusers' own error, whatever it is: it must not load as a random model
        model = UNet2DConditionModel.from_pretrained(folder)
        model.conv_in.weight.sum().item()
