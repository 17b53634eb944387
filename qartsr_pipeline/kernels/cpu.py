"""The two backends for CPUs, both on oneDNN: `onednn` multiplies bytes, `float` the same integers as float32 numbers.

Feature maps are channels-last throughout: others are converted, and so are all results. The 16-bit branch is a float convolution
that oneDNN adds to the product in place.
"""

from __future__ import annotations

import platform
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.kernels import compiled
from qartsr_pipeline.kernels.backend import X86, Backend, Constraints, NormFusion
from qartsr_pipeline.kernels.codes import Grid, quantize, weight_bytes
from qartsr_pipeline.kernels.stored_layer import LayerSpec, StoredLayer
from qartsr_pipeline.kernels.tokens import SIGN, linear_of_tokens, unsigned

BRANCH_OPERATORS = ("mkldnn._linear_pointwise", "mkldnn._convolution_pointwise_")


@cache
def has_bfloat16() -> bool:
    """Whether products of bfloat16 are faster than those of float32 here. oneDNN takes them on any processor with AVX512, and
    computes them many times slower where instructions for them are missing. Builds for macOS have no oneDNN.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = platform.machine().lower() in X86
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_on_cpu(dtype: torch.dtype) -> torch.dtype:
    """What the branch is computed in and the product is returned in, for inputs of this dtype; float16 is too slow or absent on
    processors, and so is bfloat16 on older ones.
    """
    return torch.bfloat16 if dtype == torch.bfloat16 and has_bfloat16() else torch.float32


@dataclass(frozen=True)
class Branch:
    """Both factors in the dtype computed in; `down` (r, C) has phi in it. Where their product (N, C[, kh, kw]) takes no more
    multiplications, as in branches of full rank, `up` is this product, and `down` is None.
    """

    down: torch.Tensor | None
    up: torch.Tensor


def prepare_branch(layer: StoredLayer, dtype: torch.dtype) -> Branch | None:
    """None at rank 0."""
    spec = layer.spec
    if not spec.rank:
        return None
    down, up = layer.branch_down * layer.smooth, layer.branch_up
    inputs, outputs = spec.in_channels, spec.out_channels * spec.taps
    if inputs * outputs > spec.rank * (inputs + outputs):
        return Branch(down.to(dtype), _channels_last(up.to(dtype)))
    product = torch.einsum("nr...,rc->nc...", up.float(), down)
    return Branch(None, _channels_last(product.to(dtype)))


def _channels_last(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last if weight.dim() == 4 else torch.contiguous_format)


def hidden_rows(rows: torch.Tensor, branch: Branch) -> torch.Tensor:
    """(rows, C) -> (rows, r), the branch's down-projection, or the rows themselves where it has none. oneDNN's: the BLAS is
    several times slower for so few outputs.
    """
    rows = rows.to(branch.up.dtype)
    return rows if branch.down is None else torch.ops.mkldnn._linear_pointwise(rows, branch.down, None, "none", [], "")


def row_branch(branch: Branch | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """What adds the branch of rows to a float32 output, in place; None without one."""
    if branch is None:
        return None

    def add(rows: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = hidden_rows(rows, branch)
        return y.addmm_(hidden, branch.up.t()) if branch.up.dtype == y.dtype else y.add_(F.linear(hidden, branch.up))

    return add


def add_branch(y: torch.Tensor, hidden: torch.Tensor, branch: Branch, spec: LayerSpec) -> None:
    """y (B, N, H', W') += the up-convolution of hidden (B, r, H, W), in place and in the convolution's own epilogue."""
    torch.ops.mkldnn._convolution_pointwise_(
        y, hidden, branch.up, None, spec.padding, spec.stride, (1, 1), 1, "add", 1.0, None, [], None
    )


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B H W, C), a view of channels-last input."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def as_map(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B H W, K) -> (B, K, H, W) channels-last, for B, H and W of `x`."""
    return rows.view(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Ready:
    """What both backends keep of a layer.

    Attributes:
        multiplier: (C,), phi / scale of the input; None on the token grid, which has no constants of the input.
        zero_point: of the input.
    """

    multiplier: torch.Tensor | None
    zero_point: int
    branch: Branch | None

    def grid(self, layer: StoredLayer, dtype: torch.dtype) -> Grid:
        """Of the input's codes, which are unsigned as bytes and centred as floats. Not of a layer on the token grid."""
        assert self.multiplier is not None
        low, offset = -self.zero_point, 0 if dtype.is_floating_point else self.zero_point
        return Grid(self.multiplier, low, low + 2**layer.spec.activation_bits - 1, offset, dtype)


Kept = TypeVar("Kept", bound=Ready)


class OnCPU(Backend, NormFusion, Generic[Kept]):
    """What both backends have in common: a convolution's passes, one after the other."""

    code_dtype: torch.dtype

    @abstractmethod
    def ready(self, layer: StoredLayer, dtype: torch.dtype, pixels: int | None = None) -> Kept:
        """What is kept of the layer for inputs of this dtype, of so many pixels an image where that is known."""

    @abstractmethod
    def conv2d_product(self, codes: torch.Tensor, ready: Kept, layer: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
        """Codes (B, C, H, W) channels-last -> scaled product with bias (B, N, H', W') in `dtype`, channels-last."""

    def prepare(self, layer: StoredLayer, dtype: torch.dtype) -> None:
        self.ready(layer, dtype)

    def conv2d(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        """The result is channels-last."""
        ready, rows = self.ready(layer, x.dtype, x.shape[2] * x.shape[3]), as_rows(x)
        return self._conv2d(quantize(rows, ready.grid(layer, self.code_dtype)), rows, x, ready, layer)

    def _conv2d(
        self, codes: torch.Tensor, rows: torch.Tensor | None, x: torch.Tensor, ready: Kept, layer: StoredLayer
    ) -> torch.Tensor:
        """Of the input's rows (pixels, C), which only a branch needs, and their codes; `x` gives batch, height and width."""
        y = self.conv2d_product(as_map(codes, x), ready, layer, dtype_on_cpu(x.dtype))
        if ready.branch is not None and rows is not None:
            add_branch(y, as_map(hidden_rows(rows, ready.branch), x), ready.branch, layer.spec)
        return y.to(x.dtype)

    def norm_fusion(self) -> NormFusion | None:
        return self if compiled.works() else None

    def group_scale_shift(self, x: torch.Tensor, norm: nn.GroupNorm) -> tuple[torch.Tensor, torch.Tensor]:
        return compiled.group_scale_shift(_images(x), norm)

    def norm_conv2d(
        self,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        layer: StoredLayer,
        silu: bool,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The result is channels-last."""
        if silu:
            ready = self.ready(layer, x.dtype, x.shape[2] * x.shape[3])
            grid, keep = ready.grid(layer, self.code_dtype), ready.branch is not None
            codes, rows = compiled.normalize_and_quantize(_images(x), scale, shift, grid, keep)
            y = self._conv2d(codes, rows, x, ready, layer)
        else:
            y = self.conv2d((x * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype), layer)
        return y if residual is None else y.add_(residual)


def _images(x: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, H W, C), contiguous; a view of channels-last input in the dtypes that `compiled` takes."""
    x = x if x.dtype in compiled.BITS_OF else x.float()
    return as_rows(x).contiguous().view(x.shape[0], -1, x.shape[1])


@dataclass(frozen=True)
class Constants(Ready):
    """A layer's constants. `scale` is weights' times input's, of the weights alone on the token grid."""

    codes: torch.Tensor  # int8, as `weight_bytes` gives them
    scale: torch.Tensor  # (N,), shaped to broadcast over `codes`

    def weight(self) -> torch.Tensor:
        """The float weights that the input's codes are multiplied by."""
        return self.codes.float().mul_(self.scale)


def _make_constants(layer: StoredLayer, dtype: torch.dtype) -> Constants:
    codes, branch = weight_bytes(layer), prepare_branch(layer, dtype)
    if layer.spec.grid == "token":
        return Constants(None, 0, branch, codes, layer.weight_scale[:, None])
    return Constants(
        layer.smooth / layer.input_scale,
        int(layer.input_zero_point),
        branch,
        codes,
        (layer.weight_scale * layer.input_scale).view(-1, *[1] * (codes.dim() - 1)),
    )


class FloatProduct(OnCPU[Constants]):
    """Any CPU whose torch was built with oneDNN; for those that multiply bytes no faster than floats.

    Codes are rounded and clamped as in every backend, and are exact in float32; scale and bias ride on the product. Against the
    reference: constants are made once, and every pass over a feature map that can be left out is.

    Memory: one byte a weight beside the stored ones, none at 8 bits, where the stored bytes are the codes; with `low_memory` none
    ever. A layer's weights are floats during its own call only.
    """

    name = "float"
    code_dtype = torch.float32
    constraints = (Constraints(device="cpu", operators=BRANCH_OPERATORS),)

    def ready(self, layer: StoredLayer, dtype: torch.dtype, pixels: int | None = None) -> Constants:
        computed = dtype_on_cpu(dtype)
        return layer.prepared.get(layer, ("float", computed), lambda stored: _make_constants(stored, computed))

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        ready = self.ready(layer, x.dtype)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if layer.spec.grid == "token":
            weight = ready.weight()
            y = linear_of_tokens(rows, layer, lambda codes: F.linear(codes.float(), weight), row_branch(ready.branch))
            return y.view(*x.shape[:-1], -1)
        y = F.linear(quantize(rows, ready.grid(layer, torch.float32)), ready.weight(), layer.bias)
        if ready.branch is not None:
            y += F.linear(hidden_rows(rows, ready.branch), ready.branch.up)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def conv2d_product(self, codes: torch.Tensor, ready: Constants, layer: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
        return F.conv2d(codes, ready.weight(), layer.bias, layer.spec.stride, layer.spec.padding).to(dtype)


@cache
def has_vnni() -> bool:
    """Whether sums are in 32 bits. Without VNNI two neighbouring products are added in 16 bits, saturating: 2 x 255 x 127 is
    beyond 2^15, 2 x 63 x 127 and 2 x 255 x 31 are not.
    """
    codes, weight = torch.full((8, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    scale, zero_point = torch.ones(16), torch.zeros(16, dtype=torch.int32)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    sums = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, zero_point, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((sums == 64 * 255 * 127).all())


@dataclass(frozen=True)
class Prepacked(Ready):
    """A layer's constants as oneDNN wants them. On the token grid the input's scale is 1 there."""

    weight: torch.Tensor  # opaque layout
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    input_scale: float


def _make_prepacked(layer: StoredLayer, dtype: torch.dtype, side: int) -> Prepacked:
    spec, weight = layer.spec, weight_bytes(layer)
    token = spec.grid == "token"
    input_scale, input_zero_point = (1.0, SIGN) if token else (float(layer.input_scale), int(layer.input_zero_point))
    if spec.kind == "conv2d":
        shape = (1, spec.in_channels, *(max(side, kernel) for kernel in spec.kernel_size))
        quantizer, geometry = (input_scale, input_zero_point), (spec.stride, spec.padding, (1, 1), 1)
        weight = torch.ops.onednn.qconv_prepack(weight, layer.weight_scale, *quantizer, *geometry, shape)
    else:
        weight = torch.ops.onednn.qlinear_prepack(weight, None)
    return Prepacked(
        None if token else layer.smooth / layer.input_scale,
        input_zero_point,
        prepare_branch(layer, dtype),
        weight,
        layer.weight_scale,
        torch.zeros_like(layer.weight_scale, dtype=torch.int32),
        input_scale,
    )


SMALL_MAP, LARGE_MAP = 8, 16  # sides of the maps that weights are laid out for


class OneDNN(OnCPU[Prepacked]):
    """x86 processors; W8A8 only with VNNI. Integer products: unsigned activations with a zero point, signed weights.

    Centred weight codes of 2 to 8 bits are signed bytes, codes of activations unsigned ones, and products are summed in 32 bits,
    so the integers are those of the reference. Scale and bias are oneDNN's own epilogue.

    Memory: beside the stored weights of b bits stands a prepacked copy of them, one byte per weight (twice the stored bytes at 4
    bits), and the branch in the model's dtype. With `low_memory` neither is kept.
    """

    name = "onednn"
    code_dtype = torch.uint8
    constraints = (
        Constraints(
            device="cpu",
            machines=X86,
            operators=(
                "onednn.qconv_prepack",
                "onednn.qconv2d_pointwise",
                "onednn.qlinear_prepack",
                "onednn.qlinear_pointwise",
                *BRANCH_OPERATORS,
            ),
            needs_vnni=frozenset({(8, 8)}),
            has_vnni=has_vnni,
        ),
    )

    def ready(self, layer: StoredLayer, dtype: torch.dtype, pixels: int | None = None) -> Prepacked:
        """The layout that oneDNN wants of a convolution's weights differs between small and other maps, of which it is told by an
        example; weights in another one it lays out anew in every call.
        """
        computed = dtype_on_cpu(dtype)
        side = SMALL_MAP if pixels is not None and pixels <= SMALL_MAP**2 else LARGE_MAP
        return layer.prepared.get(layer, ("onednn", computed, side), lambda stored: _make_prepacked(stored, computed, side))

    def linear(self, x: torch.Tensor, layer: StoredLayer) -> torch.Tensor:
        packed = self.ready(layer, x.dtype)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if layer.spec.grid == "token":

            def product(codes: torch.Tensor) -> torch.Tensor:
                return _linear_product(unsigned(codes), packed, None, torch.float32)

            return linear_of_tokens(rows, layer, product, row_branch(packed.branch)).view(*x.shape[:-1], -1)
        y = _linear_product(quantize(rows, packed.grid(layer, torch.uint8)), packed, layer.bias, dtype_on_cpu(x.dtype))
        if packed.branch is not None:
            y.addmm_(hidden_rows(rows, packed.branch), packed.branch.up.t())
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def conv2d_product(self, codes: torch.Tensor, ready: Prepacked, layer: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
        geometry = (layer.spec.stride, layer.spec.padding, (1, 1), 1)  # no dilation, one group
        return torch.ops.onednn.qconv2d_pointwise(*_operands(codes, ready), layer.bias, *geometry, *_epilogue(dtype))


def _linear_product(codes: torch.Tensor, packed: Prepacked, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Codes (rows, C) -> scaled product with bias (rows, N) in `dtype`."""
    return torch.ops.onednn.qlinear_pointwise(*_operands(codes, packed), bias, *_epilogue(dtype))


def _operands(codes: torch.Tensor, packed: Prepacked) -> tuple[torch.Tensor | float | int, ...]:
    quantizer = (packed.input_scale, packed.zero_point)
    return codes, *quantizer, packed.weight, packed.weight_scale, packed.weight_zero_point


def _epilogue(dtype: torch.dtype) -> tuple[float, int, torch.dtype, str, list[float], str]:
    """A float output (scale 1, zero point 0) and nothing after it."""
    return 1.0, 0, dtype, "none", [], ""
