"""The stages of a training: RPQ, module after module, and ET, all modules at once (QArtSR, arXiv 2503.05584).

Reversed per-module quantization (RPQ, the second stage of the paper) quantizes modules one after another. The paper's terms, and
where they are here:

- *modules*: the blocks of the network, or its parts, in the order that the stage gives (`StagePlan.turns`). Reversed, what runs
  before a module is still full precision and what runs after it is quantized already.
- *module loss*: distance of the module's own output to what it returns at full precision (the term ``module_l2``).
- *image loss*: distance of the network's image to full precision's (the terms ``image_l2``, ``image_l1``, ``perceptual``).

While a module has its turn the loss is the weighted sum of the two, and its gradient reaches the module and all modules that are
quantized already. Other orders, parts instead of blocks, and a network at full precision around the module make the stages of
other methods.

Every module is trained on the same few batches: their full-precision block outputs are recorded once (`Recording`), and while a
module has its turn, the blocks before the first quantized one return what was recorded, so a step neither computes them nor keeps
anything of them for the gradient.

Extended end-to-end training (ET, the third stage) trains the parameters of all modules at once. Every step draws fresh patches,
and compares the quantized model's image with the full-precision model's: a1 perceptual + a2 L2 in the paper, the stage's weights
here. So the modules that RPQ quantized last are trained as long as the first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from qartsr_pipeline.calibration.family import Family, Output, outputs_of, tensor_of
from qartsr_pipeline.calibration.recipe import Stage
from qartsr_pipeline.calibration.run_folder import ACTIVATIONS
from qartsr_pipeline.calibration.training.blocks import Block, Turn
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.steps import StagePlan, Training

MEMORY_FOR_ACTIVATIONS = 2 * 2**30  # bytes of recorded block outputs that stay in memory; more go to disk


def quantize_per_module(training: Training, plan: StagePlan) -> None:
    """The whole stage, from the position on that the training is at."""
    for block in training.blocks:
        block.quantize(False)
    folder = training.state.path.parent if training.state.path else None
    with TensorStore(MEMORY_FOR_ACTIVATIONS, folder) as store:
        batches = min(training.context.recipe.cached_batches, sum(plan.steps))
        recording = record(training.context, training.blocks, plan, batches, store)
        for number, turn in enumerate(plan.turns):
            quantize_module(training.blocks, turn, plan.stage)
            if number >= training.position.turn:
                training.take_turn(plan, number, ModuleLoss(training.context, recording, plan, number))
    training.next_stage()


@torch.no_grad()
def record(context: CalibrationContext, blocks: list[Block], plan: StagePlan, batches: int, store: TensorStore) -> Recording:
    """Runs the full-precision network on so many of the stage's batches, and keeps what every block returns."""
    quantizing = {block: block.layers[0].quantizing for block in blocks}
    for block in blocks:
        block.quantize(False)
    recording = Recording(context.family, context.pipeline, blocks, store)
    stage = plan.stage
    for index in range(batches):
        rng = np.random.default_rng([context.seed, plan.index, 1, index])
        batch = context.family.training_batch(context.patches, stage.batch, stage.patch, context.degradation, rng)
        recording.add(context.workers.part(batch).to(context.device))
    for block, before in quantizing.items():
        block.quantize(before)
    return recording


def quantize_module(blocks: list[Block], turn: Turn, stage: Stage) -> None:
    """Quantizes the turn's blocks: beside those that had theirs before, or alone in a network of full precision."""
    if stage.others == "full_precision":
        for block in blocks:
            block.quantize(False)
    for block in turn.blocks:
        block.quantize(True)


class ModuleLoss:
    """Step of a turn -> its loss, a scalar: image loss plus module loss.

    The module's target is what it returned at full precision for the full-precision input, also where it now sees a quantized
    one: what came before is then corrected for as well (our reading).
    """

    def __init__(self, context: CalibrationContext, recording: Recording, plan: StagePlan, number: int):
        self.context, self.recording, self.stage = context, recording, plan.stage
        self.module = plan.turns[number].blocks[-1]
        self.first_step = sum(plan.steps[:number])  # so that not every module begins with the same batch

    def __call__(self, step: int) -> torch.Tensor:
        recording = self.recording
        index = (self.first_step + step) % len(recording.batches)
        first_quantized = next(block for block in recording.blocks if block.layers[0].quantizing)
        with recording.replayed(index, first_quantized), outputs_of({"module": self.module.module}) as seen:
            output = self.context.family.run(self.context.pipeline, recording.batches[index])
        module = None
        if self.stage.loss.get("module_l2"):
            module = seen["module"], recording.output(index, self.module)
        return self.context.family.loss(self.stage.loss, output, recording.targets[index], self.context.perceptual, module)


def train_end_to_end(training: Training, plan: StagePlan) -> None:
    """The whole stage, from the position on that the training is at."""
    for block in training.blocks:
        block.quantize(True)
    training.take_turn(plan, 0, lambda step: end_to_end_loss(training.context, plan, step))
    training.next_stage()


def end_to_end_loss(context: CalibrationContext, plan: StagePlan, step: int) -> torch.Tensor:
    """The loss of one step, a scalar."""
    family, stage = context.family, plan.stage
    rng = np.random.default_rng([context.seed, plan.index, 2, step])
    batch = family.training_batch(context.patches, stage.batch, stage.patch, context.degradation, rng)
    batch = context.workers.part(batch).to(context.device)
    with torch.no_grad():
        target = family.run(context.full_precision, batch)
    output = family.run(context.pipeline, batch)
    return family.loss(stage.loss, output, target, context.perceptual)


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
