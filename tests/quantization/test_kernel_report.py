"""What a model is said to consist of, and to run on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from quantized_models import quantized_pipeline
from torch import nn

from qartsr_pipeline.kernels import BACKENDS, dispatch, use_backend
from qartsr_pipeline.kernels.cpu import OneDNN
from qartsr_pipeline.quantization.calibrating import prepare
from qartsr_pipeline.quantization.diffusers_quantizer import attached_scheme
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.report import describe_model, kernel_summary
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_vae


@pytest.fixture
def vae() -> nn.Module:
    """W4A4 with two layers at W8A8."""
    scheme = QuantizationScheme(LayerScheme(4, 4), {"*coder.conv_in": LayerScheme(8, 8)})
    return freeze(prepare(build_tiny_vae(), scheme), scheme)


def test_the_summary_counts_the_kernels_of_all_models(vae):
    count = len(describe_model("vae", vae).layers)
    with use_backend("reference"):
        assert kernel_summary(vae, device="cpu") == f"{count} layers reference"
        assert kernel_summary(vae, vae, device="cpu") == f"{2 * count} layers reference"
    assert kernel_summary(build_tiny_vae(), device="cpu") == ""


@pytest.mark.skipif(BACKENDS["onednn"].unavailable() is not None, reason="oneDNN's integer kernels are for x86 processors")
def test_the_summary_shows_layers_on_slower_kernels(vae, monkeypatch):
    count = len(describe_model("vae", vae).layers)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    monkeypatch.setattr(OneDNN, "constraints", tuple(replace(one, has_vnni=lambda: False) for one in OneDNN.constraints))
    monkeypatch.setattr(BACKENDS["winograd"].__class__, "preferred_for", lambda self, spec: False)  # it needs numba
    dispatch._choose.cache_clear()
    try:
        assert kernel_summary(vae, device="cpu") == f"{count - 2} layers onednn, 2 float"
    finally:
        dispatch._choose.cache_clear()


def test_a_report_says_bits_bytes_and_where_it_was_folded():
    pipeline = quantized_pipeline()
    report = describe_model("unet", pipeline.unet)
    assert report.quantized and report.bits.endswith("folded at T = 250") and "W4A4 x" in report.bits
    stored = {**dict(pipeline.unet.named_parameters()), **dict(pipeline.unet.named_buffers())}
    assert report.packed_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    float_model = describe_model("vae", build_tiny_vae())
    assert not float_model.quantized and float_model.bits == "float32" and float_model.layers == []


def test_prepared_bytes_are_those_of_the_first_call(vae):
    report = describe_model("vae", vae)
    with torch.no_grad():
        vae.decode(vae.encode(torch.zeros(1, 3, 16, 16)).latent_dist.mode())
    kept = {name: layer.prepared.bytes for name, layer in vae.named_modules() if name in {r.name for r in report.layers}}
    assert kept == {layer.name: layer.prepared_bytes for layer in report.layers}


def test_the_scheme_of_a_quantized_model_is_attached(vae):
    scheme = attached_scheme(vae)
    assert scheme is not None and scheme.for_layer("encoder.conv_in") == LayerScheme(8, 8)
    assert attached_scheme(build_tiny_vae()) is None
