"""Full-precision block outputs, kept: while a block has its turn, those before it return what they returned then.

So a step neither computes what lies before the first quantized block, nor keeps anything of it for the gradient. The outputs are
kept in a `TensorStore`, in memory up to a limit and on disk beyond it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from qartsr_pipeline.calibration.family import Family, Output, tensor_of
from qartsr_pipeline.calibration.run_folder import ACTIVATIONS
from qartsr_pipeline.calibration.training.blocks import Block


class Recording:
    """The outputs of every block of a full-precision network, batch by batch.

    Args:
        pipeline: none of its blocks quantizes while `add` runs.
        blocks: in the order in which they run.

    Attributes:
        batches, targets: the network's input, and what it gave for it.
    """

    def __init__(self, family: Family, pipeline: DiffusionPipeline, blocks: list[Block], store: TensorStore):
        self.family, self.pipeline, self.blocks, self.store = family, pipeline, blocks, store
        self.batches: list[torch.Tensor] = []
        self.targets: list[Output] = []
        self._shapes: dict[str, torch.Size] = {}
        self._tuples: set[str] = set()

    @torch.no_grad()
    def add(self, batch: torch.Tensor) -> None:
        """Runs the network on a training batch and keeps what its blocks and it return."""
        handles = [block.module.register_forward_hook(self._keep(len(self.batches), block)) for block in self.blocks]
        try:
            target = self.family.run(self.pipeline, batch)
        finally:
            for handle in handles:
                handle.remove()
        self.batches.append(batch)
        self.targets.append(target)

    def _keep(self, index: int, block: Block) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, tuple):
                self._tuples.add(block.name)
            tensor = tensor_of(output)
            self._shapes[f"{index}.{block.name}"] = tensor.shape
            self.store.put(f"{index}.{block.name}", tensor)

        return hook

    def output(self, index: int, block: Block) -> torch.Tensor:
        """What a block returned for batch ``index``."""
        return self.store.get(f"{index}.{block.name}")

    @contextmanager
    def replayed(self, index: int, upto: Block) -> Iterator[None]:
        """Within, the blocks before ``upto`` return what they returned for batch ``index``.

        Of parts that lie wholly before, only the last block's output is read by what follows: the others return zeros without
        memory, in the right shape.
        """
        before = self.blocks[: self.blocks.index(upto)]
        needed = {block.part: block for block in before}  # the last of each part
        own = {block: block.module.__dict__.get("forward") for block in before}
        for block in before:
            if block.part == upto.part or needed[block.part] is block:
                tensor = self.output(index, block)
            else:
                tensor = torch.zeros((), device=self.batches[index].device).expand(self._shapes[f"{index}.{block.name}"])
            block.module.forward = _returning((tensor,) if block.name in self._tuples else tensor)
        try:
            yield
        finally:
            for block, forward in own.items():
                if forward is None:
                    del block.module.forward  # the class's own again
                else:
                    block.module.forward = forward


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


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
