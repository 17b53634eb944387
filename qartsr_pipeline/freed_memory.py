"""Memory that a process frees stays with it, on Linux with glibc, so that the next feature map gets its pages.

Otherwise glibc gives every large tensor back to the system when it is freed, and the next one gets new pages, one by one, each
filled with zeros first. On a CPU that takes a sixth to nearly half of the time of an enlargement (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # numbers of malloc.h
OPTIONS = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 << 20}
_keeping: list[bool] = []  # True in it once the process keeps memory
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Has this process keep what it frees until it ends. For a program's own process: it concerns everything in it.

    Not for what holds small tensors for long between large ones, as gradients of a large model do: these would lie in the gaps,
    and every large one would need new memory.

    Returns:
        Whether it is so now: not on other systems, with other C libraries (glibc before 2.33 cannot say how much it keeps), or
        where the environment has settings of its own.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    mallopt = _from_c_library("mallopt")
    if mallopt is None or _from_c_library("mallinfo2") is None:
        return False
    if not all(mallopt(option, value) == 1 for option, value in OPTIONS.items()):
        return False
    _keeping.append(True)
    return True


def kept_memory() -> int:
    """Bytes that this process keeps and does not use, so that they are free for it; 0 unless it was told to keep memory."""
    mallinfo = _from_c_library("mallinfo2") if _keeping else None
    if mallinfo is None:
        return 0
    mallinfo.restype = _MallocInfo
    return max(0, mallinfo().fordblks - OPTIONS[TOP_PAD])  # of which this much may never have been touched


def return_freed_memory() -> None:
    """Gives back what is free now, where the C library can: worth it after something large that does not come again."""
    trim = _from_c_library("malloc_trim")
    if trim is not None:
        trim(0)


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2`; fordblks are bytes in free blocks."""

    _fields_ = [
        (name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _from_c_library(name: str) -> Any:
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl has no such function
        return None
