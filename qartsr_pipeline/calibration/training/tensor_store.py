"""Tensors under names, in memory up to a limit and on disk beyond it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qartsr_pipeline.calibration.run_folder import ACTIVATIONS


class TensorStore:
    """Use as a context: the temporary folder goes with it.

    Args:
        limit: bytes kept in memory.
        folder: where the temporary folder is made, None for the system's own place.
    """

    def __init__(self, limit: int, folder: Path | None = None):
        self.limit, self.parent = limit, folder
        self.folder: Path | None = None
        self.bytes_in_memory = 0
        self._tensors: dict[str, torch.Tensor] = {}
        self._files: dict[str, tuple[Path, torch.device]] = {}

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()
        self._files.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keeps a copy of ``tensor``, detached.

        Raises:
            OSError: the disk is full; the message says where and how much was to be written.
        """
        size = tensor.numel() * tensor.element_size()
        if self.bytes_in_memory + size <= self.limit:
            self._tensors[name] = tensor.detach().clone()
            self.bytes_in_memory += size
            return
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix=ACTIVATIONS, dir=self.parent))
        path = self.folder / f"{len(self._files)}.safetensors"
        try:
            save_file({"tensor": tensor.detach().contiguous()}, path)
        except Exception as error:  # safetensors has exceptions of its own for a full disk
            raise OSError(
                f"{path.parent}: {size / 1e6:.0f} MB of activations cannot be written ({error}): make room, or use fewer"
                " or smaller patches (cached_batches, batch, patch)"
            ) from error
        self._files[name] = path, tensor.device

    def get(self, name: str) -> torch.Tensor:
        """The tensor, on the device that it came from."""
        if name in self._tensors:
            return self._tensors[name]
        path, device = self._files[name]
        return load_file(path, device=str(device))["tensor"]
