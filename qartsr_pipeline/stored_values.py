"""Values in weight files that cannot be right, found while a checkpoint is loaded, with the file and the tensor that hold them.

A checkpoint whose checksums agree may still hold NaN: it may have been made with it. Quantized layers would hide it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from qartsr_pipeline.checkpoint_files import CheckpointError

DAMAGED = "The file is damaged, or was made from damaged weights. Download or make the checkpoint again"


class StoredValueError(ValueError):
    """A tensor's values cannot be right. `tensor` is its name in the model, or the beginning of it."""

    def __init__(self, tensor: str, flaw: str, way_out: str = ""):
        super().__init__(f"{tensor} {flaw}. {way_out}{DAMAGED}.")
        self.tensor = tensor


def check_finite(model: nn.Module) -> None:
    """Checks all floating-point tensors of a loaded model.

    Raises:
        StoredValueError: one holds NaN or infinity.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.is_meta:
            continue
        # a sum takes a tenth of the time, and is not finite either
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))) and not bool(torch.isfinite(tensor).all()):
            half = tensor.dtype == torch.float16
            way_out = (
                "Values above 65504 do not fit float16: try dtype=torch.bfloat16 or torch.float32. Otherwise: " if half else ""
            )
            raise StoredValueError(name, "holds NaN or infinity", way_out)


@contextmanager
def naming_the_file(folder: Path) -> Iterator[None]:
    """Within this context a checkpoint folder is loaded.

    Raises:
        CheckpointError: for a StoredValueError, with the weight file that holds the tensor.
    """
    try:
        yield
    except StoredValueError as error:
        raise CheckpointError(f"{_holder(folder, error.tensor)}: {error}") from error


def _holder(folder: Path, tensor: str) -> Path:
    """The weight file that holds the tensor; the folder if none does."""
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if any(name == tensor or name.startswith(f"{tensor}.") for name in file.keys()):  # noqa: SIM118 - no mapping
                return path
    return folder
