"""The processes that share one list of pictures: those of `accelerate launch`, and otherwise one, without accelerate.

Nobody hands out pictures: every process takes each n-th of one list. They meet twice, for the list and for the result, on the CPU
(gloo): a GPU's own means of exchange would be set up for a few bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

# A process that is done waits for the others, whose shares may take days; the default would end that after half an hour.
_PATIENCE = timedelta(days=14)
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Processes:
    """What one process knows of all.

    Attributes:
        index, count: this one's number, from 0, and how many there are on all machines.
        is_local_main: whether this one speaks for its machine.
        device: the one that the launcher leaves to this process, such as `cuda:1`; None where it has no say.
    """

    index: int = 0
    count: int = 1
    is_local_main: bool = True
    device: str | None = None

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list that is the same in all. Every n-th, so that sizes that grow with the name are spread."""
        return list(items[self.index :: self.count])

    def of_main(self, value: T) -> T:
        """The first process's `value`, in all."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all, once every one has come here.

        A process must not end before: its exit code, if not 0, has the launcher stop those that are still at work.
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

    told_cpu = asked_device == "auto" and _flag("ACCELERATE_USE_CPU")
    on_gpu = asked_device in ("auto", "cuda") and not told_cpu and torch.cuda.is_available()
    state = PartialState(cpu=not on_gpu, backend="gloo", timeout=_PATIENCE)
    device = str(state.device) if on_gpu else "cpu" if told_cpu else None
    return Processes(state.process_index, state.num_processes, state.is_local_main_process, device)


def _is_one_of_several() -> bool:
    """By the variables of `accelerate launch`'s two ways of starting processes: torchrun, and for `--cpu` mpirun."""
    if "LOCAL_RANK" in os.environ and _number("WORLD_SIZE") > 1:
        return True
    return _flag("ACCELERATE_USE_CPU") and any(_number(name) > 1 for name in _MPI_SIZES)


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 1


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "t", "y")
