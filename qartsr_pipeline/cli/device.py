"""Where and in which float type to compute, and why, so that the user sees it."""

from __future__ import annotations

import torch

from qartsr_pipeline.cli.messages import UsageError

_CPU = "no CUDA or MPS device is available to PyTorch"


def choose_device(asked: str, own: str | None = None) -> tuple[str, str]:
    """Returns the device and the reason for it.

    Args:
        asked: auto, cuda, mps or cpu.
        own: the device that is left to this process, one of several, such as `cuda:1`; it has the last word.

    Raises:
        UsageError: the device that was asked for is not there.
    """
    if own is not None:
        return own, "this process's own"
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked == "auto":
        device = next(name for name, there in available.items() if there)
        return device, {"cuda": f"found {_gpu_name()}", "mps": "found Apple's GPU", "cpu": _CPU}[device]
    if not available[asked]:
        there = ", ".join(name for name, is_there in available.items() if is_there)
        raise UsageError(
            f"--device {asked}: PyTorch {torch.__version__} has no such device here, only {there}. The driver or a PyTorch"
            f" built for this device may be missing. --device auto takes what is there."
        )
    return asked, "as asked"


def choose_dtype(asked: str, device: str) -> tuple[torch.dtype, str]:
    """`asked` is auto or a float type's name. Returns the type that floating-point tensors are loaded in, and the reason."""
    if asked != "auto":
        return getattr(torch, asked), "as asked"
    device = device.partition(":")[0]
    if device == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16, "this GPU computes in it at full speed, and it cannot overflow"
    if device == "cuda":
        return torch.float16, "this GPU has no fast bfloat16; stages that overflow are repeated in float32"
    if device == "mps":
        return torch.float16, "half the memory of float32; stages that overflow are repeated in float32"
    return torch.float32, "the safe choice on a CPU"


def _gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""
