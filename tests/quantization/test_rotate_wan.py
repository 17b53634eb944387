"""Rotations in the weights of WAN's transformer: exact, and outliers go."""

from __future__ import annotations

import pytest
import torch
from test_fold_wan import output, prompt_of, transformer_of

from qartsr_pipeline.quantization.fold_wan import fold_wan
from qartsr_pipeline.quantization.rotate_wan import residual_rotation, rotate_wan


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize("others", [3, 40])  # with the output projection joined to the values, and without
@torch.no_grad()
def test_rotating_changes_nothing(cross_attn_norm, others):
    transformer, prompt = transformer_of(cross_attn_norm=cross_attn_norm), prompt_of(2, others)
    expected = output(transformer, prompt)
    fold_wan(transformer, 400, prompt)
    weight = transformer.blocks[1].attn1.to_v.weight
    before, names = weight.clone(), {name: t.shape for name, t in transformer.state_dict().items()}
    rotate_wan(transformer)
    found = output(transformer, prompt)
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    assert torch.equal(weight, before) and not torch.equal(transformer.blocks[1].attn1.to_v.weight, before)
    assert {name: t.shape for name, t in transformer.state_dict().items()} == names


@torch.no_grad()
def test_outliers_of_the_residual_stream_are_spread():
    transformer, prompt = transformer_of(), prompt_of(2, 3)
    fold_wan(transformer, 400, prompt)
    transformer.patch_embedding.bias[5] = 50.0
    seen = []
    handle = transformer.blocks[0].attn1.to_q.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    output(transformer, prompt)
    rotate_wan(transformer)
    output(transformer, prompt)
    handle.remove()
    peaks = [float((x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean()) for x in seen]
    assert peaks[1] < 0.6 * peaks[0], peaks


@pytest.mark.parametrize("size", [2, 64, 256])
def test_the_rotation_is_orthogonal_and_keeps_the_mean(size):
    rotation = residual_rotation(size)
    assert torch.allclose(rotation @ rotation.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(rotation @ ones, ones, atol=1e-12)


def test_only_what_is_folded():
    with pytest.raises(ValueError, match="only a folded transformer"):
        rotate_wan(transformer_of())
