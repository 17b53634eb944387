"""The Triton backend for GPUs. Only `backend` can be imported where Triton is not installed."""

import os


def interpreted() -> bool:
    """Whether kernels whose modules are imported from now on run in Triton's interpreter on a CPU: TRITON_INTERPRET=1."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "yes", "on", "y")
