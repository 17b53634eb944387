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

from qartsr_pipeline import CheckpointError, QArtSRPipeline
from qartsr_pipeline.checkpoint_files import write_checksums
from tiny_models import build_tiny_pipeline

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


def tensor_with(change):
    def changed(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        change(tensor.view(-1)[-1:])
        return tensor

    return changed


NOT_FINITE = [
    (name, value)
    for name in ("weight_scale", "input_scale", "smooth", "bias", "branch_up", "branch_down")
    for value in ("nan", "inf")
]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, float(value), "holds NaN or infinity") for name, value in NOT_FINITE),
        ("smooth", -1, "smooth holds -1, but must be above 0"),
        ("smooth", 0, "smooth holds 0, but must be above 0"),
        ("weight_scale", 0, "weight_scale holds 0"),
        ("input_scale", -0.5, "input_scale holds -0.5"),
        ("input_scale", 1e-45, "smooth divided by input_scale is infinite"),
        ("weight_scale", 1e-45, "weight_scale times input_scale is 0 or infinite"),
        ("weight_zero_point", 8, "the zero point 8, but its 3-bit grid ends at 7"),
        ("input_zero_point", 64, "the zero point 64, but its 6-bit grid ends at 63"),
    ],
)
def test_values_that_no_layer_can_compute_with_are_refused(folder: Path, name: str, value: float, message: str):
    def change(tensors: dict) -> None:
        tensors[f"{LAYER}.{name}"] = tensor_with(lambda last: last.fill_(value))(tensors[f"{LAYER}.{name}"])

    change_tensors(folder, change)
    assert_refused(folder, f"{LAYER}.*{message}")


@pytest.mark.parametrize("name", ["mid_block.resnets.0.norm1.weight", "mid_block.resnets.0.time_emb_proj.value"])
def test_values_outside_of_quantized_layers_are_checked_too(folder: Path, name: str):
    change_tensors(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(torch.nan))
    assert_refused(folder, f"{name} holds NaN or infinity")


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_pipeline_names_the_file_and_the_tensor(tmp_path: Path, part: str, quantized: bool):
    (quantized_pipeline() if quantized else build_tiny_pipeline()).save_pretrained(tmp_path)
    name = {"unet": "conv_norm_out.bias", "vae": "decoder.conv_norm_out.bias"}[part]
    change_tensors(tmp_path / part, lambda tensors: tensors[name].view(-1)[-1:].fill_(torch.inf))
    write_checksums(tmp_path)
    with pytest.raises(CheckpointError, match=f"{part}.{WEIGHTS}.*{name} holds NaN or infinity.*Download or make"):
        QArtSRPipeline.from_pretrained(tmp_path)


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
        (lambda config: config.update(format_version=99), "format_version 99.*Upgrade"),
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
