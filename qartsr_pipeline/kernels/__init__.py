"""How a deployed layer is computed.

A backend is a class that implements the protocol in `backend`; `dispatch` holds the table of them and the choice. What runs is
the first entry of `BACKENDS` that can; `use_backend` and the environment variable QARTSR_BACKEND override that.
"""

from qartsr_pipeline.kernels.backend import Backend, Constraints, NormFusion
from qartsr_pipeline.kernels.dispatch import (
    BACKENDS,
    choose_backend,
    forced_backend,
    list_backends,
    norm_fusion,
    register,
    run_layer,
    use_backend,
)
from qartsr_pipeline.kernels.finite import note_input, watched_inputs
from qartsr_pipeline.kernels.stored_layer import LayerSpec, PreparedWeights, StoredLayer, low_memory

__all__ = [
    "BACKENDS",
    "Backend",
    "Constraints",
    "LayerSpec",
    "NormFusion",
    "PreparedWeights",
    "StoredLayer",
    "choose_backend",
    "forced_backend",
    "list_backends",
    "low_memory",
    "norm_fusion",
    "note_input",
    "register",
    "run_layer",
    "use_backend",
    "watched_inputs",
]
