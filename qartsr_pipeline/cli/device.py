"""On which device and in which float type a command computes, with the reasons, which it prints."""

from __future__ import annotations

import torch

from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.kernels.cpu import has_bfloat16
from qartsr_pipeline.loading import default_device

WITHOUT_BFLOAT16 = (
    "this processor has no instructions for it: quantized layers take a few per cent longer than in float32, and convolutions"
    " that are not quantized can take many times as long"
)


def choose_device(asked: str, own: str | None = None) -> tuple[str, str]:
    """Returns the device and the reason for it.

    Args:
        asked: auto, cuda, cuda:N, mps or cpu.
        own: the device that the launcher of several processes leaves to this one, such as `cuda:1`; it takes precedence.

    Raises:
        UsageError: there is no such device.
    """
    if own is not None:
        return own, "this process's own"
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    others = ["mps", "cpu"] if torch.backends.mps.is_available() else ["cpu"]
    if asked == "auto":
        chosen = default_device()
        if chosen == "cuda":
            return chosen, f"found {torch.cuda.get_device_name()}"
        return chosen, "found Apple's GPU" if chosen == "mps" else "no CUDA or MPS device is available to PyTorch"
    if asked in (*gpus, *others) or (asked == "cuda" and torch.cuda.is_available()):
        return asked, "as asked"
    raise UsageError(
        f"--device {asked}: PyTorch {torch.__version__} has no such device here, only {', '.join([*gpus, *others])}. The driver"
        " or a PyTorch built for this device may be missing. --device auto takes the best one there is."
    )


def choose_dtype(asked: str, device: str) -> tuple[torch.dtype, str]:
    """Returns the dtype that floating-point tensors are loaded in, and the reason for it.

    Args:
        asked: auto, or the name of a dtype.
        device: such as `cpu`, `cuda` or `cuda:1`.
    """
    kind = torch.device(device).type
    if (asked, kind) == ("float16", "cpu"):
        return torch.float32, "instead of float16, in which CPUs are far slower; bfloat16 saves as much memory"
    if (asked, kind) == ("bfloat16", "cpu") and not has_bfloat16():
        return torch.bfloat16, f"as asked; {WITHOUT_BFLOAT16}"
    if asked != "auto":
        return getattr(torch, asked), "as asked"
    if kind == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return torch.bfloat16, "this GPU computes in it at full speed, and it cannot overflow"
    if kind == "cuda":
        return torch.float16, "this GPU has no fast bfloat16; stages that overflow are repeated in float32"
    if kind == "mps":
        return torch.float16, "half the memory of float32; stages that overflow are repeated in float32"
    if kind != "cpu":
        return torch.float32, "the safe choice on this kind of device"
    if has_bfloat16():
        return torch.bfloat16, "this processor computes faster in it; --dtype float32 is slower and slightly more exact"
    return torch.float32, "this processor has no instructions for bfloat16"
