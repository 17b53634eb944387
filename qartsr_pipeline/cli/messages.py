"""Errors as a user of the command line sees them: one line each."""

from __future__ import annotations


class UsageError(ValueError):
    """What was asked for on the command line cannot be meant."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: the allocators of processors, Apple's and NVIDIA's GPUs raise a RuntimeError that says so."""
    told = ("defaultcpuallocator", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in told)


def one_line(error: BaseException) -> str:
    """The error in one line. One that nobody foresaw gets its kind in front, and the way to its traceback."""
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"out of memory ({text or type(error).__name__}). Try a smaller --tile-size, such as 256, or --device cpu."
    if isinstance(error, (ValueError, TypeError, OSError, FloatingPointError)) and text:
        return text
    return f"{type(error).__name__}: {text} (unexpected: --debug shows the traceback)"
