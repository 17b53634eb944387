"""What quantized layers would hide: NaN and infinity between two layers of a stage whose result is finite."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from quantized_models import prepared, quantized_pipeline
from torch import nn

from qartsr_pipeline import overflow
from qartsr_pipeline.kernels import note_input, watched_inputs
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_pipeline

IMAGE = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
BLOCK = "mid_block.resnets.0"


class Times(nn.Module):
    """What a layer with larger weights gives."""

    def __init__(self, layer: nn.Module, factor: float):
        super().__init__()
        self.layer, self.factor = layer, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.factor


def enlarge(pipe) -> np.ndarray:
    return pipe(IMAGE, output_type="np", color_fix=None).images[0]


@pytest.fixture
def pipe(monkeypatch):
    """In float16, with an overflow in front of a GroupNorm, which takes the factor away again."""
    monkeypatch.setattr(overflow, "TOO_SLOW", set())
    pipe = build_tiny_pipeline()
    scheme = QuantizationScheme(LayerScheme(8, 8))  # without branches, which pass NaN on
    freeze(prepared(pipe.unet, scheme), scheme)
    block = pipe.unet.get_submodule(BLOCK)
    for name in ("conv1", "time_emb_proj"):
        setattr(block, name, Times(getattr(block, name), 1e6))
    return pipe


def in_float16(pipe):
    """As loaded in it: tensors outside of quantized layers are cast."""
    pipe = copy.deepcopy(pipe)
    for model in (pipe.unet, pipe.vae, pipe.prompt_embedding):
        for module in model.modules():
            if not type(module).__name__.startswith("Deployed"):
                for table in (module._parameters, module._buffers):
                    for tensor in table.values():
                        if tensor is not None and tensor.is_floating_point():
                            tensor.data = tensor.data.half()
    return pipe


def test_an_overflow_between_quantized_layers_is_repaired_and_said_once(pipe, caplog):
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = pipe.network().step(latents)
        half = in_float16(pipe)
        with watched_inputs() as inputs:
            hidden = half.unet(latents.half(), 250, half.prompt_embedding(1)).sample
        assert bool(torch.isfinite(hidden).all()) and not inputs.all_finite(), "a result that looks right"
        caplog.clear()
        for _ in range(2):
            assert (half.network().step(latents) - expected).norm() < 0.05 * expected.norm()
    assert caplog.text.count("Stage 'unet' overflowed in float16 and is run in float32") == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_in_memory_is_an_error_in_float32(value):
    pipe = quantized_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.get_submodule(BLOCK).norm1.weight.data[3] = value
    with pytest.raises(FloatingPointError, match="'unet'.*NaN or infinity"):
        enlarge(pipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_watch_sees_one_value_among_many_and_no_large_sums(dtype):
    x = torch.full((2, 3, 200, 200), 60000, dtype=dtype)
    with watched_inputs() as inputs:
        note_input(x)
        note_input(x[:0])
    assert inputs.all_finite()
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[1, 2, 7, 9] = value
        with watched_inputs() as inputs:
            note_input(x), note_input(spoilt), note_input(-spoilt)
        assert not inputs.all_finite()
    note_input(spoilt)  # nobody watches
