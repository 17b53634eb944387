"""Memory that a process frees stays with it, on Linux with glibc, so that the next feature map gets its pages.

Otherwise glibc gives every large tensor back to the system when it is freed, and the next one gets new pages, one by one, each
filled with zeros first. On a CPU that can be a sixth of the time of an enlargement (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # numbers of malloc.h
OPTIONS = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 << 20}
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Has this process keep what it frees until it ends. For a program's own process: it concerns everything in it.

    Returns:
        Whether it is so now: not on other systems, with other C libraries, or where the environment has settings of its own.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    mallopt = _from_c_library("mallopt")
    return mallopt is not None and all(mallopt(option, value) == 1 for option, value in OPTIONS.items())


def return_freed_memory() -> None:
    """Gives back what is free now, where the C library can: worth it after something large that does not come again."""
    trim = _from_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _from_c_library(name: str) -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl has neither function
        return None
