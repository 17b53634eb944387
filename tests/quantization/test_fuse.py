"""Blocks exchanged for ones with fewer passes compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from quantized_models import quantized_pipeline, run
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.image.tile_statistics import SharedStatistics
from qartsr_pipeline.kernels import BACKENDS
from qartsr_pipeline.quantization import fuse as fusing
from qartsr_pipeline.quantization.fuse import (
    LeanResnetBlock,
    ProductAttention,
    ProductVideoAttention,
    convolution_of_normalized,
    fuse,
)
from tiny_models import build_tiny_pipeline

REFERENCE = BACKENDS["reference"]


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


def test_a_loaded_model_is_fused_wherever_it_can_be(tmp_path):
    """A VAE's decoder names its time embedding otherwise, and has most of the work."""
    quantized_pipeline().save_pretrained(tmp_path)
    loaded = QArtSRPipeline.from_pretrained(tmp_path)
    blocks = [block for model in (loaded.unet, loaded.vae) for block in model.modules() if hasattr(block, "conv1")]
    assert blocks and all(isinstance(block, LeanResnetBlock) for block in blocks)
    loaded.save_pretrained(tmp_path / "again")
    assert fuse(QArtSRPipeline.from_pretrained(tmp_path / "again").vae) == 0


class Fusion:
    """One that takes the norm into its pass; counts how often."""

    calls = 0

    @staticmethod
    def group_scale_shift(x, norm):
        variance, mean = torch.var_mean(x.reshape(len(x), norm.num_groups, -1), dim=2, correction=0)
        mean, scale = (v.repeat_interleave(x.shape[1] // norm.num_groups, 1) for v in (mean, torch.rsqrt(variance + norm.eps)))
        return scale * norm.weight, norm.bias - mean * scale * norm.weight

    def norm_conv2d(self, x, scale, shift, layer, silu, residual=None):
        assert silu
        self.calls += 1
        y = REFERENCE.conv2d(nn.functional.silu(x * scale[:, :, None, None] + shift[:, :, None, None]), layer)
        return y if residual is None else y + residual


@pytest.fixture
def backend(monkeypatch) -> Fusion:
    backend = Fusion()
    monkeypatch.setattr(fusing, "norm_fusion", lambda x, layer: backend)
    return backend


@pytest.fixture
def norm_and_convolution() -> tuple[nn.GroupNorm, nn.Module]:
    block = quantized_pipeline().vae.decoder.mid_block.resnets[0]
    nn.init.normal_(block.norm1.weight), nn.init.normal_(block.norm1.bias)
    return block.norm1, block.conv1


@torch.no_grad()
def test_a_backend_that_can_takes_the_norm_into_its_pass(backend, norm_and_convolution):
    norm, convolution = norm_and_convolution
    x = torch.randn(2, 16, 9, 7) + 1
    expected = REFERENCE.conv2d(nn.functional.silu(norm(x)), convolution)
    y = convolution_of_normalized(x, norm, convolution)
    assert backend.calls == 1 and (y - expected).norm() < 1e-2 * expected.norm()

    shared = SharedStatistics([norm], rim=0)
    with shared.record():
        norm(4 * x[:1])
    with shared.apply():
        expected = REFERENCE.conv2d(nn.functional.silu(norm(x)), convolution)
        y = convolution_of_normalized(x, norm, convolution)
    assert backend.calls == 2 and (y - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("place", ["norm", "convolution"])
@torch.no_grad()
def test_nothing_around_norm_or_convolution_is_skipped(backend, norm_and_convolution, place: str):
    norm, convolution = norm_and_convolution
    module, x, seen = {"norm": norm, "convolution": convolution}[place], torch.randn(1, 16, 4, 5), []
    hook = module.register_forward_hook(lambda *arguments: seen.append(1))
    convolution_of_normalized(x, norm, convolution)
    hook.remove()
    assert seen and not backend.calls
    own = module.forward
    module.forward = lambda x: seen.append(1) or own(x)  # as offloading does
    convolution_of_normalized(x, norm, convolution)
    assert len(seen) == 2 and not backend.calls


@torch.no_grad()
def test_what_a_hook_has_seen_stays_as_it_was():
    model = quantized_pipeline().unet
    fuse(model)
    block, seen = model.mid_block.resnets[0], []
    for module in (block.norm1, block.conv1, block.norm2, block.conv2):
        module.register_forward_hook(lambda module, inputs, output: seen.append((output, output.clone())))
    run(model)
    assert len(seen) == 4 and all(torch.equal(*pair) for pair in seen)


@torch.no_grad()
def test_a_convolution_that_was_exchanged_is_called(backend, norm_and_convolution):
    x, other = torch.randn(1, 16, 4, 5), nn.Conv2d(16, 16, 1)
    assert torch.equal(
        convolution_of_normalized(x, norm_and_convolution[0], other), other(nn.functional.silu(norm_and_convolution[0](x)))
    )


@torch.no_grad()
def test_the_pass_is_back_when_offloading_ends(backend, norm_and_convolution):
    for module in norm_and_convolution:
        add_hook_to_module(module, ModelHook())
    x = torch.randn(1, 16, 4, 5)
    convolution_of_normalized(x, *norm_and_convolution)
    assert not backend.calls
    for module in norm_and_convolution:
        remove_hook_from_module(module)
    convolution_of_normalized(x, *norm_and_convolution)
    assert backend.calls == 1


def test_blocks_that_have_hooks_are_left_as_they_are():
    """accelerate's `device_map` puts them there before a loaded model is fused."""
    model = quantized_pipeline().unet
    hooked = model.mid_block.resnets[0]
    add_hook_to_module(hooked, ModelHook())
    fuse(model)
    assert model.mid_block.resnets[0] is hooked and isinstance(model.mid_block.resnets[1], LeanResnetBlock)


def test_a_fused_block_is_compiled_without_a_break():
    model = quantized_pipeline().vae
    fuse(model)
    block, x = model.decoder.mid_block.resnets[0], torch.randn(1, 16, 6, 8)
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        expected = block(x)
        assert (compiled(x) - expected).norm() < 1e-2 * expected.norm()  # a code can be the next one


def test_fused_blocks_have_the_same_gradient():
    model = quantized_pipeline().vae
    fused = copy.deepcopy(model)
    fuse(fused)
    x = torch.randn(1, 4, 6, 8)
    gradients = []
    for one in (model, fused):
        latent = x.clone().requires_grad_()
        one.decode(latent).sample.square().mean().backward()
        gradients.append(latent.grad)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5 * gradients[0].abs().max().item())


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


@pytest.mark.parametrize("scores", [1 << 21, 500])
@pytest.mark.parametrize(("crossed", "shape"), [(False, (2, 30, 32)), (True, (2, 30, 32)), (False, (2, 32, 5, 6))])
def test_attention_by_products_gives_what_diffusers_gives(monkeypatch, scores: int, crossed: bool, shape: tuple[int, ...]):
    """Rounded to bfloat16 once more; in one piece or in several."""
    monkeypatch.setattr(fusing, "SCORES", scores)
    monkeypatch.setattr(fusing, "FEWEST_TOKENS", 8)
    monkeypatch.setattr(fusing, "dtype_on_cpu", lambda dtype: dtype)
    in_vae = len(shape) == 4
    torch.manual_seed(0)
    usual = Attention(32, 24 if crossed else None, heads=4, dim_head=8, residual_connection=in_vae, bias=in_vae,
                      norm_num_groups=8 if in_vae else None, rescale_output_factor=2.0 if in_vae else 1.0)  # fmt: skip
    ours = copy.deepcopy(usual).to(torch.bfloat16)
    ours.set_processor(ProductAttention())
    x, context = torch.randn(shape), torch.randn(2, 19, 24) if crossed else None
    with torch.no_grad():
        expected = usual(x, context)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # not called
            y = ours(x.bfloat16(), None if context is None else context.bfloat16())
    assert y.shape == expected.shape and y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.02 * expected.norm()


def test_attention_with_a_mask_is_left_to_diffusers(monkeypatch):
    monkeypatch.setattr(fusing, "FEWEST_TOKENS", 8)
    monkeypatch.setattr(fusing, "dtype_on_cpu", lambda dtype: dtype)
    usual = Attention(32, heads=4, dim_head=8).to(torch.bfloat16)
    ours = copy.deepcopy(usual)
    ours.set_processor(ProductAttention())
    x, mask = torch.randn(2, 30, 32).bfloat16(), torch.zeros(2, 1, 30, dtype=torch.bfloat16)
    mask[..., 20:] = -1e4
    with torch.no_grad():
        assert torch.equal(ours(x, attention_mask=mask), usual(x, attention_mask=mask))


def test_attention_of_quantized_layers_is_exchanged_unless_somebody_has_done_so():
    unet, other = quantized_pipeline().unet, type("Other", (AttnProcessor2_0,), {})()
    modules = [m for m in unet.modules() if isinstance(m, Attention)]
    modules[0].set_processor(other)
    fuse(unet)
    assert modules[0].processor is other and len(modules) > 1
    assert all(type(m.processor) is ProductAttention for m in modules[1:])
    full_precision = build_tiny_pipeline().unet
    fuse(full_precision)
    assert not any(isinstance(one, ProductAttention) for one in full_precision.attn_processors.values())


def test_attention_of_video_by_products_gives_what_diffusers_gives(monkeypatch):
    monkeypatch.setattr(fusing, "dtype_on_cpu", lambda dtype: dtype)
    usual = WanAttention(32, heads=4, dim_head=8, processor=WanAttnProcessor()).eval()
    ours, x = copy.deepcopy(usual).to(torch.bfloat16), torch.randn(2, 24, 32)
    ours.set_processor(ProductVideoAttention())
    turns = WanRotaryPosEmbed(8, (1, 2, 2), 16)(torch.zeros(1, 1, 2, 6, 8))
    with torch.no_grad():
        expected, half = usual(x, rotary_emb=turns), ours(x.bfloat16(), rotary_emb=turns)  # few tokens: diffusers' own
        monkeypatch.setattr(fusing, "FEWEST_TOKENS", 8)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)  # not called
            y = ours(x.bfloat16(), rotary_emb=turns)
    assert y.dtype == torch.bfloat16 and not torch.equal(y, half)
    for found in (y, half):
        assert (found.float() - expected).norm() < 0.02 * expected.norm()
