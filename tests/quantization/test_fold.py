"""Folding: exact, smaller, and it knows what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from quantized_models import prepared, scheme_of, unet_inputs

from qartsr_pipeline.quantization.fold import FoldedConstant, fold
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from qartsr_pipeline.versions import dtype_argument
from tiny_models import build_tiny_unet

PROMPT = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(5))


def fresh_unet(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    unet = build_tiny_unet()
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    return UNet2DConditionModel(**{**config, **changes}).eval() if changes else unet


@pytest.mark.parametrize("timestep", [0, 250, 999])
@pytest.mark.parametrize("changes", [{}, {"resnet_time_scale_shift": "scale_shift"}])
@pytest.mark.parametrize("skip_time_act", [False, True])
@torch.no_grad()
def test_folding_changes_nothing_but_the_size(timestep: int, changes: dict, skip_time_act: bool):
    unet = fresh_unet(**changes)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D):
            block.skip_time_act = skip_time_act  # the configuration reaches only kinds of blocks that this UNet has none of
    latent, _, _ = unet_inputs(batch=2)
    expected = unet(latent, timestep, PROMPT.expand(2, -1, -1)).sample
    folded = ("time_emb", ".attn2.to_k.", ".attn2.to_v.")
    kept = [n for n, _ in unet.named_parameters() if not any(part in n for part in folded)]
    folding = fold(unet, timestep, PROMPT)
    assert (folding.timestep, folding.tokens) == (timestep, 4)
    output = unet(latent, timestep, PROMPT.expand(2, -1, -1)).sample
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    # from now on it ignores what it is called with, down to the number of tokens
    assert torch.equal(unet(latent, 5, torch.zeros(2, 1, 16)).sample, output)
    assert [n for n, _ in unet.named_parameters()] == kept


@torch.no_grad()
def test_folds_in_the_weights_own_precision():
    unet = fresh_unet().to(torch.bfloat16)
    latent, timestep, _ = unet_inputs()
    expected = unet(latent.bfloat16(), timestep, PROMPT.bfloat16()).sample
    fold(unet, timestep, PROMPT)
    assert {b.dtype for b in unet.buffers()} == {torch.bfloat16}
    assert torch.equal(unet(latent.bfloat16(), timestep, PROMPT.bfloat16()).sample, expected)


@torch.no_grad()
def test_a_folded_and_quantized_unet_reloads(tmp_path: Path):
    unet = fresh_unet()
    scheme = scheme_of(fold(unet, 250, PROMPT))
    freeze(prepared(unet, scheme), scheme)
    assert not [
        n for n, m in unet.named_modules() if n.endswith((".attn2.to_k", "time_emb_proj")) and type(m) is not FoldedConstant
    ]
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, **dtype_argument(UNet2DConditionModel, torch.float32))
    inputs = unet_inputs(batch=2)
    assert torch.equal(loaded(*inputs).sample, unet(*inputs).sample)
    half = UNet2DConditionModel.from_pretrained(tmp_path, **dtype_argument(UNet2DConditionModel, torch.float16))
    assert half.time_embedding.value.dtype == torch.float16


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_class_embeds": 10}, "class_embedding"),
        ({"encoder_hid_dim": 16}, "encoder_hid_proj"),
        ({"time_embedding_act_fn": "silu"}, "time_embed_act"),
        (
            {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32},
            "add_embedding",
        ),
    ],
)
def test_other_conditioning_is_refused_before_anything_is_changed(changes: dict, named: str):
    unet = fresh_unet(**changes)
    with pytest.raises(ValueError, match=named):
        fold(unet, 250, PROMPT)
    assert not [m for m in unet.modules() if isinstance(m, FoldedConstant)]


def test_attention_that_changes_its_keys_input_is_refused_before_anything_is_changed():
    unet = fresh_unet()
    unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2.norm_cross = torch.nn.LayerNorm(16)
    with pytest.raises(ValueError, match="up_blocks.0.*attn2' changes its keys' input"):
        fold(unet, 250, PROMPT)
    assert not [m for m in unet.modules() if isinstance(m, FoldedConstant)]


def test_scheme_and_model_must_agree_about_folding():
    unet = fresh_unet()
    scheme = QuantizationScheme(LayerScheme(4, 4))
    folding = fold(unet, 250, PROMPT)
    prepared(unet, scheme)
    with pytest.raises(ValueError, match="is folded, but its scheme has folding=None"):
        freeze(unet, scheme)
    plain = prepared(fresh_unet(), QuantizationScheme(LayerScheme(4, 4), folding=folding))
    with pytest.raises(ValueError, match="is not folded"):
        freeze(plain, QuantizationScheme(LayerScheme(4, 4), folding=folding))
