"""Whole models: exchanged, trained a step, frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_models import deployed_layers, prepared, run, scheme_of
from torch import nn

from qartsr_pipeline.quantization.calibrating import CalibratingLinear, calibrating_layers, prepare
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_unet, build_tiny_vae


@pytest.fixture(params=[build_tiny_unet, build_tiny_vae], ids=["unet", "vae"])
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


def test_one_step_trains_every_quantization_parameter_and_no_weight(model: nn.Module):
    scheme = scheme_of()
    prepared(model, scheme)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    names = {name.rpartition(".")[2] for name in trained}
    assert names == {
        *("log_smooth", "weight_lower", "weight_upper", "input_lower", "input_upper"),
        *("branch_up", "branch_down", "adapter_up", "adapter_down", "bias_change"),
    }
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-3)
    run(model).pow(2).sum().backward()
    assert not [n for n, p in trained.items() if p.grad is None or not torch.isfinite(p.grad).all()]
    dead = [n for n, p in trained.items() if not p.grad.any()]
    assert not dead
    optimizer.step()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert not [n for n, p in trained.items() if torch.equal(p, before[n])]
    simulated = run(model).detach()
    computed = run(freeze(model, scheme)).detach()
    assert (computed - simulated).abs().max() <= 1e-5 * simulated.abs().max()


def test_sixteen_bits_change_almost_nothing(model: nn.Module):
    """Exchange and freezing by themselves are harmless: float16 weights and a rank-1 branch that is zero."""
    expected = run(model).detach()
    scheme = QuantizationScheme(LayerScheme(16, 16, 1))
    prepare(model, scheme)
    freeze(model, scheme)
    assert (run(model) - expected).abs().max() < 5e-3 * expected.abs().max()


def test_only_what_the_scheme_names_is_exchanged(model: nn.Module):
    conv_out = model.conv_out if hasattr(model, "conv_out") else model.decoder.conv_out
    scheme = QuantizationScheme(LayerScheme(4, 4), {"*conv_out": None, "*conv_in": LayerScheme(16, 16)})
    names = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    prepare(model, scheme)
    expected = {n for n in names if not n.endswith(("conv_out", "conv_in"))}
    assert set(calibrating_layers(model)) == expected
    freeze(model, scheme)
    assert set(deployed_layers(model)) == expected and not calibrating_layers(model)
    assert type(conv_out) is nn.Conv2d and any(m is conv_out for m in model.modules())


def test_queries_keys_and_values_of_self_attention_share_input_parameters():
    unet = prepare(build_tiny_unet(), QuantizationScheme(LayerScheme(4, 4, 1), {"*down*.attn1.to_q": LayerScheme(4, 8)}))
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    q, k, v = block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
    for name in ("log_smooth", "input_lower", "input_upper"):
        assert getattr(q, name) is getattr(k, name) is getattr(v, name)
    assert q.weight_lower is not k.weight_lower and q.branch_down is not k.branch_down
    cross = block.attn2
    assert cross.to_k.input_lower is not cross.to_q.input_lower and cross.to_k.log_smooth is not cross.to_v.log_smooth
    # other bits, another quantizer; the two that agree still share
    attention = unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1
    assert (
        attention.to_q.input_lower is not attention.to_k.input_lower and attention.to_k.input_lower is attention.to_v.input_lower
    )


@pytest.mark.parametrize("pattern", ["*.to_q", "*.to_k", "*.to_v", "*.attn1.*"])
def test_attention_may_be_quantized_in_part(pattern: str):
    scheme = QuantizationScheme(LayerScheme(4, 4), {pattern: None})
    unet = prepare(build_tiny_unet(), scheme)
    assert type(unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_out[0]) is CalibratingLinear
    assert torch.isfinite(run(freeze(unet, scheme))).all()


def test_convolutions_without_a_quantized_form_are_left_alone():
    odd = {"groups": 4, "padding": "same", "padding_mode": "reflect", "dilation": 2}
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, **{k: v}) for k, v in odd.items()), nn.Conv2d(4, 4, 3))
    assert set(calibrating_layers(prepare(model, QuantizationScheme()))) == {"4"}


def test_calibration_can_be_resumed_and_copied(model: nn.Module):
    scheme = scheme_of()
    original = prepared(copy.deepcopy(model), scheme, seed=1)
    resumed = prepare(model, scheme, adapter_rank=1)
    assert not any(resumed.load_state_dict(original.state_dict()))
    assert torch.equal(run(resumed), run(original)) and torch.equal(run(copy.deepcopy(original)), run(original))


def test_nothing_to_quantize(model: nn.Module):
    with pytest.raises(ValueError, match="quantizes no layer"):
        prepare(model, QuantizationScheme(LayerScheme(16, 16)))
    with pytest.raises(ValueError, match="quantizes no layer"):
        prepare(model, QuantizationScheme(overrides={"*": None}))
    with pytest.raises(ValueError, match="no layer is prepared"):
        freeze(model, QuantizationScheme(LayerScheme(16, 16)))
    freeze(prepare(model, QuantizationScheme()), QuantizationScheme())
    with pytest.raises(ValueError, match="already quantized"):
        prepare(model, QuantizationScheme())


def test_freezing_with_another_scheme_is_refused(model: nn.Module):
    """The folder that it would write could not be loaded."""
    prepare(model, QuantizationScheme(LayerScheme(4, 4), {"*conv_in": None}))
    for other in (QuantizationScheme(LayerScheme(4, 6), {"*conv_in": None}), QuantizationScheme(LayerScheme(4, 4))):
        with pytest.raises(ValueError, match="not prepared with this scheme.*prepared otherwise"):
            freeze(model, other)


def test_freezing_that_fails_leaves_the_model_as_it_was(model: nn.Module):
    prepare(model, QuantizationScheme())
    layers = calibrating_layers(model)
    list(layers.values())[-1].log_smooth.data[0] = float("nan")
    with pytest.raises(ValueError, match="log_smooth of .* is not finite"):
        freeze(model, QuantizationScheme())
    assert list(calibrating_layers(model)) == list(layers)


def test_a_remembered_weight_follows_every_change():
    """Weights that are not trained are quantized once; whatever they are made of may change."""
    layer = CalibratingLinear.from_layer(nn.Linear(8, 6), LayerScheme(4, 4, 2), adapter_rank=2)
    layer.requires_grad_(False)
    layer.branch_down.normal_()
    x = torch.randn(3, 8)
    seen = [layer(x)]
    assert layer.qweight is layer.qweight
    for name in ("log_smooth", "branch_up", "adapter_up", "weight_upper"):
        layer.get_parameter(name).add_(0.3)
        seen.append(layer(x))
        assert not torch.equal(seen[-1], seen[-2]), name
    layer.layer_scheme = LayerScheme(2, 4, 2)
    assert not torch.equal(layer(x), seen[-1])
    assert not torch.equal(copy.deepcopy(layer).qweight, torch.zeros(6, 8)) and torch.equal(
        copy.deepcopy(layer).qweight, layer.qweight
    )
    with torch.inference_mode():
        again = layer(x)
    layer.adapter_up.requires_grad_(True)
    layer(x).sum().backward()  # nothing that was made in inference mode is in the way
    assert layer.adapter_up.grad is not None and torch.equal(again, layer(x))
