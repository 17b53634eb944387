"""How a deployed layer is computed: one file a backend, one dispatch table.

A backend is a module with

- ``NAME``,
- ``CONSTRAINTS``: what it demands of machine, device and layer, one `Constraints` for each kind of device,
- ``unavailable() -> str | None``: why it cannot run on this machine at all,
- ``unsupported(spec, device) -> str | None``: why it cannot run this layer there; both follow from ``CONSTRAINTS``,
- ``linear(x, layer)`` and ``conv2d(x, layer)``: the whole layer (integer product, branch, bias) on a deployed layer's buffers,
- where it keeps anything beside the stored weights, ``prepared(layer, dtype)``: makes it, in the layer's `PreparedWeights`,
- where it can, ``group_scale_shift(x, norm)`` and ``norm_conv2d(x, scale, shift, layer, silu, residual)``: a GroupNorm as one
  factor and one summand a channel, and a convolution that applies them to its input within its own pass and adds the residual
  (`normalizing_backend`).

A linear layer's input goes through `shared_operand` or `shared_codes`, so that layers of one input quantize it once.

What runs is the first entry of `BACKENDS` that can; `use_backend` and the environment variable QARTSR_BACKEND override that.
"""

from qartsr_pipeline.kernels.compiled import register
from qartsr_pipeline.kernels.constraints import Constraints
from qartsr_pipeline.kernels.dispatch import (
    BACKENDS,
    choose_backend,
    forced_backend,
    list_backends,
    normalizing_backend,
    run_layer,
    use_backend,
)
from qartsr_pipeline.kernels.layer_spec import LayerSpec
from qartsr_pipeline.kernels.prepared import PreparedWeights, low_memory
from qartsr_pipeline.kernels.shared_input import quantize_alike, shared_input

__all__ = [
    "BACKENDS",
    "Constraints",
    "LayerSpec",
    "PreparedWeights",
    "choose_backend",
    "forced_backend",
    "list_backends",
    "low_memory",
    "normalizing_backend",
    "quantize_alike",
    "register",
    "run_layer",
    "shared_input",
    "use_backend",
]
