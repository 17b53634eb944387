"""Folding of WAN's transformer: exact, smaller, and it reloads."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from qartsr_pipeline.quantization.diffusers_quantizer import attach_quantizer
from qartsr_pipeline.quantization.fold_wan import FoldedConditions, FoldedCrossAttention, fold_wan, fold_wan_structure
from qartsr_pipeline.quantization.scheme import Folding, LayerScheme, QuantizationScheme

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 96,
    "num_layers": 2,
}
WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
    "freq_dim": 256,
}


def transformer_of(**changes) -> WanTransformer3DModel:
    """Random, with norms that do something."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(**TINY | changes).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return transformer


def prompt_of(zeros: int, others: int) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.cat([torch.randn(1, others, 24), torch.zeros(1, zeros, 24)], 1)


def output(transformer, prompt, timestep=400):
    torch.manual_seed(2)
    latents = torch.randn(2, 4, 3, 8, 6).to(next(transformer.parameters()).dtype)
    timesteps = torch.full((2,), timestep)
    return transformer(latents, timesteps, prompt.to(latents).expand(2, -1, -1), return_dict=False)[0]


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize(("zeros", "others", "joined"), [(9, 3, True), (0, 40, False), (5, 1, True)])
@torch.no_grad()
def test_folding_changes_nothing_but_the_size(cross_attn_norm, zeros, others, joined):
    transformer, prompt = transformer_of(cross_attn_norm=cross_attn_norm), prompt_of(zeros, others)
    before = sum(p.numel() for p in transformer.parameters())
    expected = output(transformer, prompt)
    folding = fold_wan(transformer, 400, prompt)
    assert folding == Folding(400, others + bool(zeros))
    found = output(transformer, prompt)
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(output(transformer, torch.zeros(1, 2, 24), timestep=7), found), "timestep and prompt are ignored now"
    assert all((block.attn2.to_out is None) == joined for block in transformer.blocks)
    assert sum(t.numel() for t in (*transformer.parameters(), *transformer.buffers())) < 0.95 * before
    with pytest.raises(ValueError, match="folded already"):
        fold_wan(transformer, 400, prompt)


@torch.no_grad()
def test_thirty_layers_deep():
    transformer, prompt = transformer_of(num_layers=30), prompt_of(30, 1)
    expected = output(transformer, prompt)
    fold_wan(transformer, 400, prompt)
    assert (output(transformer, prompt) - expected).norm() <= 1e-6 * expected.norm()


def test_a_sixth_of_wan_1_3b_goes():
    with torch.device("meta"):
        transformer = WanTransformer3DModel(**WAN_1_3B)
    before = sum(p.numel() for p in transformer.parameters())
    fold_wan_structure(transformer, Folding(399, 2))
    after = sum(t.numel() for t in (*transformer.parameters(), *transformer.buffers()))
    assert before == pytest.approx(1_419e6, rel=1e-3) and after <= 0.84 * before


@torch.no_grad()
def test_the_precision_of_the_weights_stays():
    transformer, prompt = transformer_of().to(torch.bfloat16), prompt_of(4, 1)
    expected = output(transformer, prompt).float()
    fold_wan(transformer, 400, prompt)
    assert {t.dtype for t in (*transformer.parameters(), *transformer.buffers())} == {torch.bfloat16}
    assert (output(transformer, prompt).float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("others", [1, 40])
@torch.no_grad()
def test_a_folded_transformer_reloads(tmp_path, others):
    transformer, prompt = transformer_of(cross_attn_norm=True), prompt_of(4, others)
    folding = fold_wan(transformer, 400, prompt)
    attach_quantizer(transformer, QuantizationScheme(LayerScheme(16, 16), folding=folding))
    expected = output(transformer, prompt)
    transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(loaded.condition_embedder, FoldedConditions) and isinstance(loaded.blocks[1].attn2, FoldedCrossAttention)
    assert torch.equal(output(loaded, prompt), expected)


def test_image_conditioning_is_refused_before_anything_is_changed():
    transformer = transformer_of(image_dim=8, added_kv_proj_dim=64)
    with pytest.raises(ValueError, match="reads an image"):
        fold_wan(transformer, 400, prompt_of(1, 1))
    assert not isinstance(transformer.condition_embedder, FoldedConditions)
