"""Calibrating layers: float weights frozen, quantization parameters trainable, the forward simulates the deployed layer.

They extend optimum-quanto's QLinear and QConv2d without registering (its table is process-global), and replace its quantizer with
QArtSR's (arXiv 2503.05584):

    y = L1 (L2 x) + Q_W((W - L1 L2 + F1 F2) / phi) * Q_A(phi x) + b

For a convolution L2 is a 1 x 1 and L1 the k x k convolution, F1 F2 acts on the flattened kernel (our reading).
The weights may be held in 16 bits, see `held_weights`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from optimum.quanto.nn import QConv2d, QLinear, QModuleMixin
from torch import nn

from qartsr_pipeline.arithmetic.affine import affine_parameters, centred_codes
from qartsr_pipeline.quantization.held_weights import forward_of_held
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers, replace_module

if TYPE_CHECKING:
    from typing_extensions import Self  # a part of the standard library from Python 3.11 on


def _stored_in_16_bit(x: torch.Tensor) -> torch.Tensor:
    """What float16 storage leaves of x; straight-through. Simulated, so that calibration corrects for it."""
    return x + (x.to(torch.float16).to(x.dtype) - x).detach()


class CalibratingMixin(QModuleMixin, nn.Module):
    """Quantization parameters of one layer, all float32 `nn.Parameter`s:

    - log_smooth (C,): phi = exp(log_smooth).
    - weight_lower, weight_upper (N,): bounds of (W - L1 L2 + F1 F2) / phi, below 16 weight bits.
    - input_lower, input_upper (): bounds of phi x, below 16 activation bits.
    - branch_up (N, r[, kh, kw]), branch_down (r, C): L1, L2, for rank > 0.
    - adapter_up (N, a), adapter_down (a, K): F1, F2, for adapter_rank > 0; their product starts at 0.
    - bias_change (N,): what is added to the bias, where there is one; starts at 0.

    Layers that read the same tensor share the `log_smooth` and `input_*` objects (`prepare`).

    Attributes:
        quantizing: while False, the layer computes what it did before it was prepared.
        codes: `centred_codes`, or a function with the same values and other gradients.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    log_smooth: nn.Parameter
    weight_lower: nn.Parameter
    weight_upper: nn.Parameter
    input_lower: nn.Parameter
    input_upper: nn.Parameter
    branch_up: nn.Parameter
    branch_down: nn.Parameter
    adapter_up: nn.Parameter
    adapter_down: nn.Parameter
    bias_change: nn.Parameter
    layer_scheme: LayerScheme
    quantizing: bool = True
    codes = staticmethod(centred_codes)
    _remembered: tuple[tuple, torch.Tensor] | None = None

    @classmethod
    def from_layer(cls, layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, adapter_rank: int = 0) -> Self:
        """A calibrating layer around the weight and bias of ``layer``, which are shared and no longer require gradients.

        It starts as plain quantization with bounds from the weight's extremes and input bounds [-1, 1]; observers set the rest.
        """
        new = cls.from_module(layer, weights=None)
        # quanto keeps output statistics that this quantizer has no use for
        del new.input_scale, new.output_scale
        new.requires_grad_(False)
        new.layer_scheme = scheme
        device, weight = layer.weight.device, layer.weight
        rank = scheme.rank_for(layer)

        def parameter(name: str, *shape: int) -> None:
            new.register_parameter(name, nn.Parameter(torch.zeros(shape, device=device)))

        parameter("log_smooth", weight.shape[1])
        if scheme.weight_bits < 16:
            parameter("weight_lower", weight.shape[0])
            parameter("weight_upper", weight.shape[0])
        if scheme.activation_bits < 16:
            new.input_lower = nn.Parameter(torch.tensor(-1.0, device=device))
            new.input_upper = nn.Parameter(torch.tensor(1.0, device=device))
        if rank:
            parameter("branch_up", weight.shape[0], rank, *weight.shape[2:])
            parameter("branch_down", rank, weight.shape[1])
        if adapter_rank:
            parameter("adapter_up", weight.shape[0], adapter_rank)
            parameter("adapter_down", adapter_rank, weight[0].numel())
            nn.init.normal_(new.adapter_down, std=weight[0].numel() ** -0.5)
        if layer.bias is not None:
            parameter("bias_change", weight.shape[0])
        new.set_weight_bounds_to_extremes()
        return new

    @property
    def smooth(self) -> torch.Tensor:
        """phi, (C,)."""
        return self.log_smooth.exp()

    @property
    def has_branch(self) -> bool:
        return "branch_up" in self._parameters

    @property
    def corrected_bias(self) -> torch.Tensor | None:
        """The bias that the quantized layer adds, float32 (N,)."""
        return None if self.bias is None else self.bias.float() + self.bias_change

    def stored_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(L1, L2 / phi) as they will be stored."""
        return _stored_in_16_bit(self.branch_up), _stored_in_16_bit(self.branch_down / self.smooth)

    def merged_weight(self) -> torch.Tensor:
        """W + F1 F2, float32, the weight's shape."""
        weight = self.weight.float()
        if "adapter_up" in self._parameters:
            weight = weight + (self.adapter_up @ self.adapter_down).view_as(weight)
        return weight

    def residual_weight(self) -> torch.Tensor:
        """(W - L1 L2 + F1 F2) / phi, what is quantized; float32, the weight's shape."""
        weight = self.merged_weight() / self._over_inputs(self.smooth)
        if self.has_branch:
            up, down = self.stored_branch()
            weight = weight - torch.einsum("nr...,rc->nc...", up, down)
        return weight

    def transform_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (..., C) of phi x, or of a linear layer's residual weight, as the quantizer sees them. Its own inverse."""
        return rows

    def _over_inputs(self, values: torch.Tensor) -> torch.Tensor:
        """(C,), shaped to broadcast over the weight."""
        return values.view(1, -1, *[1] * (self.weight.dim() - 2))

    def _over_outputs(self, values: torch.Tensor) -> torch.Tensor:
        """(N,), shaped to broadcast over the weight."""
        return values.view(-1, *[1] * (self.weight.dim() - 1))

    @torch.no_grad()
    def set_weight_bounds_to_extremes(self) -> None:
        """Bounds that clip no weight, given smoothing, branch and adapter as they are; nothing at 16 weight bits."""
        if self.layer_scheme.weight_bits < 16:
            rows = self.residual_weight().flatten(1)
            self.weight_lower.copy_(rows.amin(1).clamp(max=0))
            self.weight_upper.copy_(rows.amax(1).clamp(min=0))

    def weight_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of the weight, (N,) each."""
        bits = self.layer_scheme.weight_bits
        return affine_parameters(self.weight_lower, self.weight_upper, bits, symmetric=bits == 8)

    def weight_codes(self) -> torch.Tensor:
        """Centred codes of the residual weight, integers in float32, the weight's shape."""
        scale, zero_point = self.weight_parameters()
        bits = self.layer_scheme.weight_bits
        over = self._over_outputs
        return self.codes(self.residual_weight(), 1 / over(scale), over(zero_point), bits, symmetric=bits == 8)

    @property
    def qweight(self) -> torch.Tensor:
        """The residual weight after quantization, in floating point. Remembered until a parameter changes or needs a gradient, so
        that a layer that is not trained costs no more than a float one.
        """
        parts = [parameter for parameter in self._parameters.values() if parameter is not None]
        trained = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        if trained or torch.is_inference_mode_enabled():  # tensors made in inference mode are of no use outside of it
            return self._quantized_weight()
        versions = (self.layer_scheme, *((id(part), part._version) for part in parts))
        if self._remembered is None or self._remembered[0] != versions:
            self._remembered = versions, self._quantized_weight().detach()
        return self._remembered[1]

    def forget(self) -> None:
        """Frees what `qweight` remembers."""
        self._remembered = None

    def _quantized_weight(self) -> torch.Tensor:
        if self.layer_scheme.weight_bits == 16:
            return _stored_in_16_bit(self.residual_weight())
        return self.weight_codes() * self._over_outputs(self.weight_parameters()[0])

    def input_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point of phi x, scalars."""
        return affine_parameters(self.input_lower, self.input_upper, self.layer_scheme.activation_bits)

    def quantized_input(self, x: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
        """phi x after quantization, float32; ``smooth`` is phi shaped to broadcast over x."""
        bits = self.layer_scheme.activation_bits
        if bits == 16:
            return x.float() * smooth
        scale, zero_point = self.input_parameters()
        return self.codes(x, smooth / scale, zero_point, bits) * scale

    def freeze(self) -> None:
        """quanto's in-place freezing has no meaning here.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "use qartsr_pipeline.quantization.freeze.freeze: a calibrating layer becomes a deployed one, not a QTensor"
        )

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)


class CalibratingLinear(CalibratingMixin, QLinear):
    """(..., C) -> (..., N)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.quantizing:
            return forward_of_held(self, x)
        smooth = self.smooth
        y = F.linear(self.quantized_input(x, smooth), self.qweight)
        if self.has_branch:
            up, down = self.stored_branch()
            y = y + F.linear(F.linear(x * smooth.to(x.dtype), down.to(x.dtype)), up.to(x.dtype))
        bias = self.corrected_bias
        return (y if bias is None else y + bias).to(x.dtype)


class CalibratingConv2d(CalibratingMixin, QConv2d):
    """(B, C, H, W) -> (B, N, H', W')."""

    stride: tuple[int, int]
    padding: tuple[int, int]

    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.quantizing:
            return forward_of_held(self, x)
        smooth = self.smooth.view(-1, 1, 1)
        y = self._conv_forward(self.quantized_input(x, smooth), self.qweight, None)
        if self.has_branch:
            up, down = self.stored_branch()
            hidden = F.conv2d(x * smooth.to(x.dtype), down.to(x.dtype)[:, :, None, None])
            y = y + self._conv_forward(hidden, up.to(x.dtype), None)
        bias = self.corrected_bias
        return (y if bias is None else y + bias.view(-1, 1, 1)).to(x.dtype)


def _share_input_parameters(model: nn.Module) -> None:
    """to_q, to_k and to_v of a self-attention read one tensor: they are calibrated with the same phi and input bounds."""
    for attention in model.modules():
        if not isinstance(attention, Attention) or attention.is_cross_attention:
            continue
        first_of_bits: dict[int, CalibratingMixin] = {}
        for layer in (attention.to_q, attention.to_k, attention.to_v):
            if not isinstance(layer, CalibratingMixin):  # an override left it alone
                continue
            first = first_of_bits.setdefault(layer.layer_scheme.activation_bits, layer)
            for name in list(first._parameters):
                if name == "log_smooth" or name.startswith("input_"):
                    setattr(layer, name, getattr(first, name))


Kinds = tuple[type[CalibratingMixin], type[CalibratingMixin]]


def prepare(
    model: nn.Module,
    scheme: QuantizationScheme,
    adapter_rank: int = 0,
    kinds: Kinds = (CalibratingLinear, CalibratingConv2d),
) -> nn.Module:
    """Exchanges every layer that the scheme quantizes for a calibrating one, in place, and returns the model.

    Args:
        model: a diffusers UNet or VAE (folded first, where that is wanted).
        adapter_rank: rank of the merged adapters F1 F2, 0 for none.
        kinds: classes of the new linear and convolution layers.

    Raises:
        ValueError: if nothing in the model is quantized by the scheme.
    """
    layers = quantizable_layers(model, scheme)
    if not layers:
        raise ValueError("the scheme quantizes no layer of this model; is it already quantized?")
    model.requires_grad_(False)
    for name, (layer, layer_scheme) in layers.items():
        kind = kinds[isinstance(layer, nn.Conv2d)]
        replace_module(model, name, kind.from_layer(layer, layer_scheme, adapter_rank))
    _share_input_parameters(model)
    return model


def calibrating_layers(model: nn.Module) -> dict[str, CalibratingMixin]:
    """Qualified name -> calibrating layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CalibratingMixin)}
