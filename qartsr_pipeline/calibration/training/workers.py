"""The processes of one calibration, as `accelerate launch calibration/run.py` starts them: each takes its part of every batch.

Gradients are averaged, so the parameters stay the same everywhere; what one process would compute differs by the order of sums
only. All read the pictures and set their layers; what is decided, such as ranks, the first one decides, and it alone writes.
Exchange is by gloo, on any device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from qartsr_pipeline.calibration.recipe import Recipe

T = TypeVar("T")
PATIENCE = 1.0  # seconds: the launcher stops all as soon as one ends, and the first process is to say why


@dataclass(frozen=True)
class Workers:
    """One of them, and how many there are; alone by default, and then nothing here does anything.

    Attributes:
        index, count: this one's number, from 0, and how many there are.
        device: the one that the launcher leaves to this process, such as "cuda:1"; None where it has no say.
    """

    index: int = 0
    count: int = 1
    device: str | None = None

    @property
    def several(self) -> bool:
        return self.count > 1

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def check(self, recipe: Recipe) -> None:
        """Raises ValueError for a stage whose batch cannot be divided."""
        count = self.count
        for number, stage in enumerate(recipe.stages):
            if stage.batch % count:
                raise ValueError(
                    f"the batch of stage {stage.name} has {stage.batch} patches, which {count} processes cannot share evenly:"
                    f" give --set stages.{number}.batch={-(-stage.batch // count) * count}, or other processes"
                )

    def part(self, batch: torch.Tensor) -> torch.Tensor:
        """This process's part of a batch (B, ...) that is the same in all."""
        return batch.chunk(self.count)[self.index]

    def mean(self, value: torch.Tensor) -> float:
        """Of a scalar over all processes, the same number in all."""
        if not self.several:
            return float(value)
        total = value.detach().double().cpu().clone()
        dist.all_reduce(total)
        return float(total) / self.count

    def anyone(self, flag: bool) -> bool:
        """Whether it is true in one of them."""
        return self.mean(torch.tensor(float(flag))) > 0

    def average_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Of all that have one, in place."""
        if self.several:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat)
            parts = flat.div_(self.count).split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def as_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Makes the tensors what they are in the first process."""
        for tensor in tensors if self.several else ():
            values = tensor.detach().clone()
            dist.broadcast(values, 0)
            with torch.no_grad():
                tensor.copy_(values)  # not behind autograd's back: layers remember what they made of a tensor's version

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process; the others do not call it, and end if it raises."""
        if not self.several:
            return make()
        value, error = _attempt(make) if self.is_main else (None, None)
        both = [(value, error)]
        dist.broadcast_object_list(both, 0)
        value, error = both[0]
        self._raise(error)
        return cast(T, value)

    def together(self, make: Callable[[], T]) -> T:
        """What ``make`` returns here, once all are done with it. If it raises anywhere, the first process raises that, and the
        others end. It must not wait for other processes itself.
        """
        if not self.several:
            return make()
        value, error = _attempt(make)
        errors: list[BaseException | None] = [None] * self.count
        dist.all_gather_object(errors, error)
        self._raise(next((found for found in errors if found is not None), None))
        return cast(T, value)

    def _raise(self, error: BaseException | None) -> None:
        if error is None:
            return
        if self.is_main:
            raise error
        time.sleep(PATIENCE)
        raise SystemExit(2)


def _attempt(make: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return make(), None
    except (Exception, SystemExit) as error:
        return None, error


ALONE = Workers()
