"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import resource
import sys


def peak_megabytes(device: str) -> float:
    """Of this process: allocated on the GPU, or resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
