"""A process that keeps what it frees is given no new pages for its next large array."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from qartsr_pipeline.freed_memory import keep_freed_memory, kept_memory
kept = keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 24, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
large = np.ones(1 << 28, np.uint8)
before = kept_memory()
del large
print(kept, second, kept_memory() - before)
"""


def run(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    ).stdout.split()


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the options")
def test_large_arrays_get_the_pages_of_those_before():
    kept, faults, free = run()
    assert kept == "True" and int(faults) < 64  # of some 4096 pages of 4 KB
    assert abs(int(free) - (1 << 28)) < 1 << 26  # and counts as free


def test_settings_of_the_environment_stay():
    kept, _, free = run(MALLOC_TOP_PAD_="0")
    assert kept == "False" and free == "0"
