"""The kernels as operators that torch.compile takes as they are, each with a fake implementation that knows only the shapes.

Outside of a compiled graph the functions below call the kernels directly, which spares the operator's overhead. The kernels'
modules, and with them triton, are imported at the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Pixels of a convolution's output along one side."""
    return (size + 2 * padding - kernel) // stride + 1


def _group_scale_shift(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    from qartsr_pipeline.kernels.triton.norm import group_scale_shift

    return group_scale_shift(*arguments)


def _quantize(*arguments) -> tuple[torch.Tensor, torch.Tensor]:
    from qartsr_pipeline.kernels.triton.quantize import quantize

    return quantize(*arguments)


def _linear_product(*arguments) -> torch.Tensor:
    from qartsr_pipeline.kernels.triton.linear import linear_product

    return linear_product(*arguments)


def _conv_product(*arguments) -> torch.Tensor:
    from qartsr_pipeline.kernels.triton.conv import conv_product

    return conv_product(*arguments)


_LAYER = (
    "Tensor codes, Tensor? hidden, Tensor weight_packed, Tensor weight_scale, Tensor? weight_zero_point, Tensor input_scale, "
    "Tensor input_zero_point, Tensor? code_sums, Tensor? branch_up, Tensor? bias, Tensor? residual, int bits, int activation_bits"
)
_group_scale_shift_operator = torch.library.custom_op(
    "qartsr::triton_group_scale_shift",
    _group_scale_shift,
    mutates_args=(),
    schema="(Tensor x, Tensor gamma, Tensor beta, int groups, float epsilon) -> (Tensor, Tensor)",
)
_quantize_operator = torch.library.custom_op(
    "qartsr::triton_quantize",
    _quantize,
    mutates_args=(),
    schema="(Tensor x, Tensor smooth, Tensor input_scale, Tensor input_zero_point, int bits, Tensor? branch_down, "
    "Tensor? norm_scale, Tensor? norm_shift, bool silu) -> (Tensor, Tensor)",
)
_linear_operator = torch.library.custom_op(
    "qartsr::triton_linear_product", _linear_product, mutates_args=(), schema=f"({_LAYER}, ScalarType dtype) -> Tensor"
)
_conv_operator = torch.library.custom_op(
    "qartsr::triton_conv_product",
    _conv_product,
    mutates_args=(),
    schema=f"({_LAYER}, int[] kernel_size, int[] stride, int[] padding, ScalarType dtype) -> Tensor",
)


@_group_scale_shift_operator.register_fake
def _(x, gamma, beta, groups, epsilon):
    return tuple(x.new_empty(x.shape[0], x.shape[3], dtype=torch.float32) for _ in range(2))


@_quantize_operator.register_fake
def _(x, smooth, input_scale, input_zero_point, bits, branch_down, norm_scale, norm_shift, silu):
    rank = 0 if branch_down is None else branch_down.shape[0]
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:3], rank))


@_linear_operator.register_fake
def _(codes, hidden, weight_packed, *others):
    return codes.new_empty(codes.shape[0], weight_packed.shape[0], dtype=others[-1])


@_conv_operator.register_fake
def _(codes, hidden, weight_packed, *others):
    sizes = map(output_size, codes.shape[1:3], *others[-4:-1])
    return codes.new_empty(codes.shape[0], *sizes, weight_packed.shape[0], dtype=others[-1])


def _call(operator: Callable, kernel: Callable, *arguments):
    return (operator if torch.compiler.is_compiling() else kernel)(*arguments)


def group_scale_shift(
    x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, groups: int, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `norm.group_scale_shift`."""
    return _call(_group_scale_shift_operator, _group_scale_shift, x, gamma, beta, groups, epsilon)


def quantize(
    x: torch.Tensor,
    smooth: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor,
    bits: int,
    branch_down: torch.Tensor | None = None,
    norm_scale: torch.Tensor | None = None,
    norm_shift: torch.Tensor | None = None,
    silu: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantize.quantize`."""
    norm = (norm_scale, norm_shift, silu)
    return _call(_quantize_operator, _quantize, x, smooth, input_scale, input_zero_point, bits, branch_down, *norm)


def linear_product(*arguments: torch.Tensor | int | torch.dtype | None) -> torch.Tensor:
    """See `linear.linear_product`."""
    return _call(_linear_operator, _linear_product, *arguments)


def conv_product(*arguments: torch.Tensor | int | Sequence[int] | torch.dtype | None) -> torch.Tensor:
    """See `conv.conv_product`."""
    return _call(_conv_operator, _conv_product, *arguments)
