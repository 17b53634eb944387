"""Calibrating linear layers on the token grid: what `arithmetic.token_grid` computes, with LSGQuant's parameters.

    y = L1 (L2 x) + Q_W(W_R H) * Q_X(H (phi x)) + b,    W_R = (W + C) / phi - L1 (L2 / phi)

H is block-diagonal, of Hadamard matrices, and its own inverse and transpose (LSGQuant, arXiv 2602.03182). Q_X is symmetric with a
scale for each token; with exponents input channels have scales as well, powers of two. C is a change of the weight that can be
trained, zero unless `train_residual` is called: so W_R is trained through its quantizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from qartsr_pipeline.arithmetic.token_grid import centred_token_codes, channel_exponents, draq, rotated, rotation_size
from qartsr_pipeline.quantization.calibrating import CalibratingLinear
from qartsr_pipeline.quantization.scheme import LayerScheme

if TYPE_CHECKING:
    from typing_extensions import Self  # a part of the standard library from Python 3.11 on


class TokenLinear(CalibratingLinear):
    """Parameters as in `CalibratingMixin`, but for the bounds of the input, which do not exist; and

    - input_exponents (C,): whole numbers, not trained, where the scheme has exponents; zeros until `set_exponents`.
    - weight_change (N, C): C, after `train_residual`.

    Attributes:
        online_channels: simulation only: scales of channels from the tokens that come together, DRAQ as the paper has it.
    """

    weight_change: nn.Parameter
    input_exponents: nn.Parameter
    online_channels: bool = False

    @classmethod
    def from_layer(cls, layer: nn.Linear | nn.Conv2d, scheme: LayerScheme, adapter_rank: int = 0) -> Self:
        """See `CalibratingMixin.from_layer`."""
        new = super().from_layer(layer, scheme, adapter_rank)
        for name in ("input_lower", "input_upper"):
            new._parameters.pop(name, None)
        if scheme.exponents:
            new.input_exponents = nn.Parameter(torch.zeros_like(new.log_smooth), requires_grad=False)
        return new

    @property
    def rotation(self) -> int:
        """Size of this layer's Hadamard matrices, 0 for none."""
        return rotation_size(self.weight.shape[1], self.layer_scheme.rotation)

    def transform_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """See `CalibratingMixin.transform_rows`."""
        return rotated(rows, self.rotation) if self.rotation else rows

    def train_residual(self) -> None:
        """Adds the parameter `weight_change`."""
        self.weight_change = nn.Parameter(torch.zeros_like(self.weight, dtype=torch.float32))

    def merged_weight(self) -> torch.Tensor:
        """W + C + F1 F2, float32, (N, C)."""
        weight = super().merged_weight()
        return weight + self.weight_change if "weight_change" in self._parameters else weight

    def residual_weight(self) -> torch.Tensor:
        """W_R H, what is quantized; float32, (N, C)."""
        return self.transform_rows(super().residual_weight())

    @torch.no_grad()
    def set_exponents(self, rows: torch.Tensor) -> None:
        """From a sample (positions, C) of the input, smoothing being set; nothing where the scheme has none."""
        if self.layer_scheme.exponents:
            maxima = self.transform_rows(rows.float() * self.smooth).abs().amax(0)
            self.input_exponents.copy_(channel_exponents(maxima, self.layer_scheme.activation_bits))

    def quantized_input(self, x: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
        """H (phi x) after quantization, float32, x's shape; ``smooth`` is phi."""
        values, bits = self.transform_rows(x.float() * smooth), self.layer_scheme.activation_bits
        if bits == 16:
            return values
        if self.online_channels:
            return draq(values.flatten(0, -2), bits).view_as(values)
        exponents = self.input_exponents if self.layer_scheme.exponents else None
        codes, scales = centred_token_codes(values, bits, exponents, self.codes)
        return codes * scales
