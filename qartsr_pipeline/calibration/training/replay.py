"""Full-precision block outputs, kept: while a block has its turn, those before it return what they returned then.

So a step neither computes what lies before the first quantized block, nor keeps anything of it for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.training.blocks import Block
from qartsr_pipeline.calibration.training.network_run import outputs_of, picture_of, tensor_of
from qartsr_pipeline.calibration.training.tensor_store import TensorStore


class Recording:
    """The outputs of every block of a full-precision network, batch by batch.

    Args:
        pipeline: none of its blocks quantizes while `add` runs.
        blocks: in the order in which they run.

    Attributes:
        inputs, pictures, noises: of each batch, the enlarged input, the picture and the UNet's output.
    """

    def __init__(self, pipeline: QArtSRPipeline, blocks: list[Block], store: TensorStore):
        self.pipeline, self.blocks, self.store = pipeline, blocks, store
        self.pictures: list[torch.Tensor] = []
        self.noises: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self._shapes: dict[str, torch.Size] = {}
        self._tuples: set[str] = set()

    @torch.no_grad()
    def add(self, up: torch.Tensor) -> None:
        """Runs the network on ``up`` (B, 3, H, W) in [-1, 1] and keeps what its blocks return, and the picture."""
        index = len(self.inputs)

        def keep(block: Block, output: Any) -> None:
            if isinstance(output, tuple):
                self._tuples.add(block.name)
            tensor = tensor_of(output)
            self._shapes[f"{index}.{block.name}"] = tensor.shape
            self.store.put(f"{index}.{block.name}", tensor)

        handles = [
            block.module.register_forward_hook(lambda module, inputs, output, block=block: keep(block, output))
            for block in self.blocks
        ]
        try:
            with outputs_of({"unet": self.pipeline.unet}) as seen:
                picture = picture_of(self.pipeline, up)
        finally:
            for handle in handles:
                handle.remove()
        self.inputs.append(up)
        self.pictures.append(picture)
        self.noises.append(seen["unet"])

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
                tensor = torch.zeros((), device=self.inputs[index].device).expand(self._shapes[f"{index}.{block.name}"])
            output = (tensor,) if block.name in self._tuples else tensor
            block.module.forward = lambda *_, output=output, **__: output
        try:
            yield
        finally:
            for block, forward in own.items():
                if forward is None:
                    del block.module.forward  # the class's own again
                else:
                    block.module.forward = forward
