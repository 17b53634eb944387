"""Files written once: they must be read, computed and made today as they were then, by this package and by the written format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden import FOLDER, LAYERS, description, is_robust
from numpy_reader import centred_weight_codes, compute, expected_tensors, read_safetensors
from safetensors.torch import load_file, save

from qartsr_pipeline.arithmetic import FORMAT_VERSION
from qartsr_pipeline.kernels.reference import weight_codes
from qartsr_pipeline.quantization.deployed import DeployedLayer, deployed_like
from qartsr_pipeline.quantization.freeze import freeze_layer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "stored_format.md"
DESCRIPTIONS = json.loads((FOLDER / "layers.json").read_text())


def load_deployed(name: str) -> DeployedLayer:
    layer = deployed_like(LAYERS[name].empty(), LAYERS[name].scheme)
    stored = load_file(FOLDER / name / "deployed.safetensors")
    layer.load_state_dict({key.removeprefix("layer."): tensor for key, tensor in stored.items()})
    return layer


def example(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(FOLDER / name / "example.safetensors")
    return stored["input"], stored["output"]


def frozen_again(name: str) -> DeployedLayer:
    layer = LAYERS[name].empty()
    found = layer.load_state_dict(load_file(FOLDER / name / "calibrating.safetensors"), strict=False)
    assert set(found.missing_keys) <= {"bias_change"} and not found.unexpected_keys  # it is newer than these files, and 0
    assert is_robust(layer, example(name)[0])
    return freeze_layer(layer)


def test_the_files_are_those_of_this_version():
    assert FORMAT_VERSION == 2, "a new version: keep these files readable under another name and make new ones"
    assert json.loads(json.dumps({name: description(golden) for name, golden in LAYERS.items()})) == DESCRIPTIONS
    assert {path.name for path in FOLDER.iterdir() if path.is_dir()} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_what_was_stored_computes_what_it_computed(name: str):
    x, expected = example(name)
    output = load_deployed(name)(x)
    assert torch.allclose(output, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", LAYERS)
def test_freezing_makes_the_same_file(name: str):
    """Integers and layout bit for bit; floats up to the last digits in which the exponential functions of processors differ."""
    stored = (FOLDER / name / "deployed.safetensors").read_bytes()
    tensors = {f"layer.{key}": tensor.clone() for key, tensor in frozen_again(name).state_dict().items()}
    size = 8 + int.from_bytes(stored[:8], "little")
    assert save(tensors)[:size] == stored[:size]
    for key, expected in load_file(FOLDER / name / "deployed.safetensors").items():
        tolerance = {torch.uint8: 0, torch.int8: 0, torch.float32: 1e-6, torch.float16: 2e-3}[expected.dtype]
        torch.testing.assert_close(tensors[key], expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_a_reader_that_follows_the_document_agrees(name: str):
    layer = DESCRIPTIONS[name]
    stored = read_safetensors(FOLDER / name / "deployed.safetensors")
    tensors = {key.removeprefix("layer."): array for key, array in stored.items()}
    found = {key: (array.dtype, array.shape) for key, array in tensors.items()}
    assert found == expected_tensors(layer, bias=LAYERS[name].geometry.get("bias", True))
    assert (tensors["smooth"] > 0).all()
    if layer["weight_bits"] < 16:
        assert np.array_equal(centred_weight_codes(layer, tensors), weight_codes(load_deployed(name)).numpy())
    values = read_safetensors(FOLDER / name / "example.safetensors")
    output = compute(layer, tensors, values["input"])
    assert np.allclose(output, values["output"], rtol=1e-5, atol=1e-5 * np.abs(values["output"]).max())


def test_the_document_names_every_tensor_and_its_own_example_is_right():
    text = DOCUMENT.read_text()
    assert f"`format_version` {FORMAT_VERSION}" in text
    for name in load_deployed("linear_w4a4_rank2")._buffers:
        assert f"| `{name}` |" in text
    layer = {"weight_bits": 3, "inputs": 3, "outputs": 1}
    tensors = {"weight_packed": np.array([[0x47, 0x01]], np.uint8), "weight_zero_point": np.zeros(1, np.uint8)}
    assert centred_weight_codes(layer, tensors).tolist() == [[7, 0, 5]]
