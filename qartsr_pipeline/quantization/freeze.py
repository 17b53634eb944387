"""From calibrating to deployed: integers are packed, the branch goes to 16 bits, the float weights are dropped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qartsr_pipeline.arithmetic.packing import pack
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers
from qartsr_pipeline.quantization.deployed import DeployedLayer, deployed_like
from qartsr_pipeline.quantization.diffusers_quantizer import attach_quantizer
from qartsr_pipeline.quantization.fold import FoldedConstant
from qartsr_pipeline.quantization.fold_wan import FoldedConditions
from qartsr_pipeline.quantization.scheme import QuantizationScheme, quantizable_layers, replace_module

TOO_LARGE = "float16 holds up to 65504; its smoothing factors may be too small"


def _packed_codes(layer: CalibratingMixin, zero_point: torch.Tensor) -> torch.Tensor:
    bits = layer.layer_scheme.weight_bits
    codes = layer.weight_codes()
    if codes.dim() == 4:
        codes = codes.permute(0, 2, 3, 1)  # stored (N, kh, kw, C): a kernel reads channels contiguously
    codes = codes.reshape(codes.shape[0], -1)
    if bits == 8:
        return codes.to(torch.int8).contiguous().view(torch.uint8)
    return pack((codes + zero_point[:, None]).to(torch.int32), bits)


def _check_finite(layer: CalibratingMixin, tensors: Iterable[tuple[str, torch.Tensor]], reason: str) -> None:
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} of {layer} is not finite: {reason}")


@torch.no_grad()
def freeze_layer(layer: CalibratingMixin) -> DeployedLayer:
    """The deployed layer that computes what ``layer`` simulates.

    Raises:
        ValueError: if a quantization parameter is not finite, or not any more in the type it is stored in; the message names it.
    """
    _check_finite(layer, layer.named_parameters(), "calibration diverged, lower its learning rate")
    new = deployed_like(layer, layer.layer_scheme, layer.weight.device)
    new.smooth.copy_(layer.smooth)
    if layer.has_branch:
        for name, values in zip(("branch_up", "branch_down"), layer.stored_branch(), strict=True):
            _check_finite(layer, [(name, values)], TOO_LARGE)
            new.get_buffer(name).copy_(values)
    if layer.layer_scheme.weight_bits < 16:
        scale, zero_point = layer.weight_parameters()
        new.weight_packed.copy_(_packed_codes(layer, zero_point))
        new.weight_scale.copy_(scale)
        if layer.layer_scheme.weight_bits < 8:
            new.weight_zero_point.copy_(zero_point)
    else:
        new.weight.copy_(layer.qweight)
    if new.spec.exponents:
        new.input_exponents.copy_(layer.get_parameter("input_exponents"))
    if new.spec.activation_bits < 16 and new.spec.grid == "tensor":
        scale, zero_point = layer.input_parameters()
        new.input_scale.copy_(scale)
        new.input_zero_point.copy_(zero_point)
    bias = layer.corrected_bias
    if bias is not None and new.bias is not None:
        new.bias.copy_(bias)
    _check_finite(layer, new.named_buffers(), TOO_LARGE)
    return new


def _check_scheme(model: nn.Module, scheme: QuantizationScheme) -> None:
    """A folder is rebuilt from its scheme alone, so a scheme that is not the model's makes a folder that nothing can load."""
    layers = calibrating_layers(model)
    other = [name for name, layer in layers.items() if layer.layer_scheme != scheme.for_layer(name)]
    other += quantizable_layers(model, scheme)
    if other or not layers:
        found = f"{len(other)} layers are prepared otherwise, the first is {other[0]!r}" if other else "no layer is prepared"
        raise ValueError(f"the model was not prepared with this scheme: {found}. Call `prepare` with the scheme to freeze with")
    folded = any(isinstance(module, (FoldedConstant, FoldedConditions)) for module in model.modules())
    if folded != (scheme.folding is not None):
        raise ValueError(f"the model is {'' if folded else 'not '}folded, but its scheme has folding={scheme.folding}")


def freeze(model: nn.Module, scheme: QuantizationScheme) -> nn.Module:
    """Exchanges every calibrating layer for its deployed form, in place, and marks the model as quantized with ``scheme``.

    Afterwards `save_pretrained` writes a folder that stock `from_pretrained` loads. When it raises, nothing was exchanged.

    Raises:
        ValueError: if ``scheme`` is not the one that the model was folded and prepared with; and see `freeze_layer`.
    """
    _check_scheme(model, scheme)
    frozen = {name: freeze_layer(layer) for name, layer in calibrating_layers(model).items()}
    for name, layer in frozen.items():
        replace_module(model, name, layer)
    attach_quantizer(model, scheme)
    return model
