"""Attention quantizes once what queries, keys and values are made of, and nothing else changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.attention_processor import Attention
from quantized_models import quantized_pipeline
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.kernels import BACKENDS, use_backend
from qartsr_pipeline.offloading import NothingKept
from qartsr_pipeline.quantization.fuse import fuse
from qartsr_pipeline.quantization.shared_attention import SharedInputAttention


def attention_with_shared_input() -> nn.Module:
    """The VAE's, fused; queries, keys and values quantize alike."""
    vae = quantized_pipeline().vae
    attention = vae.decoder.mid_block.attentions[0]
    for name in ("to_k", "to_v"):
        layer = copy.deepcopy(attention.to_q)
        layer.weight_packed.random_(0, 256, generator=torch.Generator().manual_seed(ord(name[-1])))
        setattr(attention, name, layer)
    fuse(vae)
    assert type(attention) is SharedInputAttention
    return attention


# What quantizes in each backend that shares and may be on this machine.
QUANTIZING = {"onednn": "input_codes", "float": "_codes", "int_mm": "_codes"}
SHARING = next((name for name in QUANTIZING if BACKENDS[name].unavailable() is None), None)
needs_sharing = pytest.mark.skipif(SHARING is None, reason="only the reference runs here, which does not share")


@pytest.fixture
def quantized(monkeypatch) -> list:
    """Inputs that the backend has quantized."""
    seen, quantize = [], getattr(BACKENDS[SHARING], QUANTIZING[SHARING])
    monkeypatch.setattr(
        BACKENDS[SHARING], QUANTIZING[SHARING], lambda rows, *others: seen.append(rows) or quantize(rows, *others)
    )
    return seen


@needs_sharing
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attention_quantizes_its_input_once(quantized, context):
    attention = attention_with_shared_input()
    with context(), use_backend(SHARING):
        x = torch.randn(2, 16, 5, 3)
        shared = attention(x)
        assert len(quantized) == 2  # and what goes to to_out
        assert torch.equal(shared, Attention.forward(attention, x)) and len(quantized) == 2 + 4
        assert torch.equal(attention(x), shared) and not torch.equal(attention(-x), shared)


@needs_sharing
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_what_a_hook_makes_of_the_input_is_quantized(context):
    attention = attention_with_shared_input()
    for change in (lambda module, inputs: (2 * inputs[0],), lambda module, inputs: (inputs[0].mul_(2),)):
        hook = attention.to_k.register_forward_pre_hook(change)
        with context(), use_backend(SHARING):
            x = torch.randn(1, 16, 5, 3)
            assert torch.equal(attention(x), Attention.forward(attention, x))
        hook.remove()


@needs_sharing
@pytest.mark.parametrize("how", ["loaded", "set", "written into", "another layer"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attention_notices_that_a_layer_quantizes_otherwise(how: str, context):
    with context(), use_backend(SHARING):
        attention, x = attention_with_shared_input(), torch.randn(1, 16, 5, 3)
        before = attention(x)
        scale = 4 * attention.to_v.input_scale
        if how == "loaded":
            attention.to_v.load_state_dict(attention.to_v.state_dict() | {"input_scale": scale})
        elif how == "set":
            attention.to_v.input_scale = scale
        elif how == "written into":
            attention.to_v.input_scale.copy_(scale)
            attention.to_v.prepared.clear()
        else:
            attention.to_v = nn.Linear(16, 16)
        assert torch.equal(attention(x), Attention.forward(attention, x)) and not torch.equal(attention(x), before)


@needs_sharing
@torch.no_grad()
def test_quantizers_are_compared_once(monkeypatch):
    attention, x, compared = attention_with_shared_input(), torch.randn(1, 16, 5, 3), []
    with use_backend(SHARING):
        attention(x)
        monkeypatch.setattr(torch, "equal", lambda *tensors: compared.append(tensors))
        attention(x)
    assert not compared


@needs_sharing
@torch.no_grad()
def test_attention_whose_accelerate_hook_was_taken_off_shares(quantized):
    vae = quantized_pipeline().vae
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_k, attention.to_v = copy.deepcopy(attention.to_q), copy.deepcopy(attention.to_q)
    add_hook_to_module(attention, ModelHook())
    remove_hook_from_module(attention)
    fuse(vae)
    with use_backend(SHARING):
        attention(torch.randn(1, 16, 5, 3))
    assert len(quantized) == 2


@needs_sharing
@torch.no_grad()
def test_attention_of_a_model_that_is_offloaded_layer_by_layer():
    """A layer's tensors are there in its own call only."""
    attention, x = attention_with_shared_input(), torch.randn(1, 16, 5, 3)
    expected = attention(x)
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.prepared = NothingKept()
        add_hook_to_module(layer, AlignDevicesHook("cpu", offload=True, offload_buffers=True))
    assert attention.to_q.smooth.device.type == "meta"
    assert torch.equal(attention(x), expected)


def test_attention_whose_layers_quantize_otherwise_is_left_alone():
    vae = quantized_pipeline().vae
    attention = vae.decoder.mid_block.attentions[0]
    attention.to_k, attention.to_v = copy.deepcopy(attention.to_q), copy.deepcopy(attention.to_q)
    attention.to_v.smooth.mul_(2)
    fuse(vae)
    assert type(attention) is Attention


def test_shared_attention_is_copied_pickled_and_compiled():
    attention, x = attention_with_shared_input(), torch.randn(1, 16, 5, 3)
    with torch.no_grad():
        expected = attention(x)
        for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert type(copied) is SharedInputAttention and torch.equal(copied(x), expected)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, rtol=1e-4, atol=1e-4)


def test_loaded_models_share():
    """Calibration gives queries, keys and values one input quantizer."""
    attentions = [m for m in QArtSRPipeline.from_pretrained("tiny-w4a4").unet.modules() if isinstance(m, Attention)]
    own = [attention for attention in attentions if not attention.is_cross_attention]
    assert own and all(type(attention) is SharedInputAttention for attention in own)
