"""The processes that share one list of images: those of `accelerate launch`, or a single one, without accelerate.

Each of n processes takes every n-th image of the list. They communicate twice, for the list and for the result, and on the CPU
(gloo), since it is only a few bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# A process that has finished waits for the others, which may take days; the default would end the wait after half an hour.
_PATIENCE = timedelta(days=14)
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """This process among those that were launched together.

    Attributes:
        index, count: its number, from 0, and how many there are on all machines.
        is_local_main: whether it is the one that prints for its machine.
        device: the device that the launcher assigns to it, such as `cuda:1`; None if it assigns none.
    """

    index: int = 0
    count: int = 1
    is_local_main: bool = True
    device: str | None = None

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that is the same in all: every n-th, which spreads sizes that grow with the name."""
        return list(items[self.index :: self.count])

    def of_main(self, value: T) -> T:
        """The first process's `value`, for all processes."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, for all of them; waits until every process has called this.

        A process must not end before: if its exit code is not 0, the launcher stops those that are still at work.
        """
        if self.count == 1:
            return [value]
        from accelerate import PartialState
        from accelerate.utils import gather_object

        values = gather_object([value])
        PartialState().destroy_process_group()
        return values


def join_processes(asked_device: str) -> Processes:
    """Joins the processes that were launched together.

    Args:
        asked_device: as in `choose_device`. With `cuda:N` all processes of a machine use that one GPU.
    """
    if not _is_one_of_several():
        return Processes()
    import torch
    from accelerate import PartialState

    forced_to_cpu = asked_device == "auto" and _flag("ACCELERATE_USE_CPU")
    on_gpu = asked_device in ("auto", "cuda") and not forced_to_cpu and torch.cuda.is_available()
    state = PartialState(cpu=not on_gpu, backend="gloo", timeout=_PATIENCE)
    device = str(state.device) if on_gpu else "cpu" if forced_to_cpu else None
    return Processes(state.process_index, state.num_processes, state.is_local_main_process, device)


def _is_one_of_several() -> bool:
    """Judged by the environment that `accelerate launch` sets: with torchrun, or with mpirun for `--cpu`."""
    if "LOCAL_RANK" in os.environ and _number("WORLD_SIZE") > 1:
        return True
    return _flag("ACCELERATE_USE_CPU") and any(_number(name) > 1 for name in _MPI_SIZES)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 1


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "t", "y")
