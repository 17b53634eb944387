"""Which pictures were used: one hash to tell training and evaluation data apart, and the versions and hardware that used them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from qartsr_pipeline.cli.device import processor

PACKAGES = ("torch", "diffusers", "transformers", "numpy", "Pillow")


def data_fingerprint(paths: list[Path]) -> dict[str, int | str]:
    """``{"count": .., "sha256": ..}``: one SHA-256 over the lines "name, space, SHA-256 of the file", sorted by name."""
    digests = sorted((path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)
    lines = "".join(f"{name} {digest}\n" for name, digest in digests)
    return {"count": len(paths), "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def versions() -> dict[str, str]:
    """Python and the packages that decide what numbers come out."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def hardware(device: str = "cpu") -> str:
    """The name of the GPU, or of the CPU with the number of threads that PyTorch uses."""
    if str(device).startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"
