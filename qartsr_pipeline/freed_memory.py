"""Memory that a process frees stays with it, on Linux with glibc, so that the next feature map gets its pages.

Otherwise glibc gives every large tensor back to the system when it is freed, and the next one gets new pages, one by one, each
filled with zeros first. On a CPU that can be a sixth of the time of an enlargement (docs/benchmarks.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # numbers of malloc.h
OPTIONS = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, TOP_PAD: 64 << 20}
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Has this process keep what it frees until it ends. For a program's own process: it concerns everything in it.

    Returns:
        Whether it is so now: not on other systems, with other C libraries, or where the environment has settings of its own.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    return all(mallopt(option, value) == 1 for option, value in OPTIONS.items())
