"""The processes of one calibration, as `accelerate launch calibration/run.py` starts them: each takes its part of every batch.

Gradients are averaged, so the parameters stay the same everywhere; what one process would compute differs by the order of sums
only. The first process reads, decides and writes; the others follow. Exchange is by gloo, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from calibration.recipe import Recipe
from qartsr_pipeline.command_line.processes import Processes

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """One of them, and how many there are; alone by default, and then nothing here does anything."""

    processes: Processes = Processes()

    @property
    def several(self) -> bool:
        return self.processes.count > 1

    @property
    def is_main(self) -> bool:
        return self.processes.is_main

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError for a stage whose batch cannot be divided."""
        count = self.processes.count
        for number, stage in enumerate(recipe.stages):
            if stage.batch % count:
                raise ValueError(
                    f"the batch of stage {stage.name} has {stage.batch} patches, which {count} processes cannot share evenly:"
                    f" give --set stages.{number}.batch={-(-stage.batch // count) * count}, or other processes"
                )

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch (B, ...) that is the same in all."""
        return batch.chunk(self.processes.count)[self.processes.index]

    def mean(self, value: torch.Tensor) -> float:
        """Of a scalar over all processes, the same number in all."""
        if not self.several:
            return float(value)
        total = value.detach().double().cpu().clone()
        dist.all_reduce(total)
        return float(total) / self.processes.count

    def anyone(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        return self.mean(torch.tensor(float(flag))) > 0

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Of all that have one, in place."""
        if self.several:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.div_(self.processes.count).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def as_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Makes the tensors what they are in the first process."""
        for tensor in tensors if self.several else ():
            dist.broadcast(tensor.data, 0)

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, or raises, in the first process; the others do not call it."""
        if not self.several:
            return make()
        value, error = None, None
        if self.is_main:
            try:
                value = make()
            except (Exception, SystemExit) as raised:
                error = raised
        value, error = self.processes.of_main((value, error))
        if error is not None:
            raise error
        return value


ALONE = Workers()
