"""How a deployed layer is computed: one file a backend, one dispatch table.

A backend is a module with

- ``NAME``,
- ``unavailable() -> str | None``: why it cannot run on this machine at all,
- ``unsupported(spec, device) -> str | None``: why it cannot run this layer there,
- ``linear(x, layer)`` and ``conv2d(x, layer)``: the whole layer (integer product, branch, bias) on a deployed layer's buffers.

What runs is the first entry of `BACKENDS` that can; `use_backend` overrides that.
"""

from qartsr_pipeline.kernels.dispatch import BACKENDS, LayerSpec, choose_backend, list_backends, use_backend

__all__ = ["BACKENDS", "LayerSpec", "choose_backend", "list_backends", "use_backend"]
