"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_megabytes(device: str) -> float:
    """Of this process: allocated on the GPU, or resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":  # the system's own count cannot be set back
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def forget_peak(device: str) -> None:
    """From here on `peak_megabytes` knows nothing of what was before; on a Mac it does."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")
