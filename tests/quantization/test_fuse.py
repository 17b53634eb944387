"""Blocks exchanged for ones with fewer passes compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_models import quantized_pipeline, run

from qartsr_pipeline.quantization.fuse import fuse
from tiny_models import build_tiny_pipeline


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_fused_models_compute_and_store_the_same(part: str):
    model = getattr(quantized_pipeline(), part)
    fused = copy.deepcopy(model)
    assert fuse(fused) > 0 and fuse(fused) == 0
    with torch.no_grad():
        expected, result = run(model), run(fused)
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    before, after = model.state_dict(), fused.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


def test_models_in_full_precision_are_left_alone():
    assert fuse(build_tiny_pipeline().unet) == 0


def test_the_blocks_input_is_left_as_it_was():
    vae = quantized_pipeline().vae
    fuse(vae)
    block = vae.decoder.mid_block.resnets[0]
    x = torch.randn(1, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    with torch.no_grad():
        block(x, None)
    assert torch.equal(x, kept)
