"""Whether Triton interprets its kernels in Python instead of compiling them: environment variable TRITON_INTERPRET=1."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """True if kernels whose modules are imported from now on run in Triton's interpreter, on a CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() in ("1", "true", "yes", "on", "y")
