"""Tests here exchange backends, or what the machine can do: no choice may be remembered from one test to the next."""

from collections.abc import Callable, Iterator

import pytest

from qartsr_pipeline.kernels import dispatch


@pytest.fixture(autouse=True)
def forget_choices() -> Iterator[Callable[[], None]]:
    """Call it to forget within a test, too."""

    def forget() -> None:
        dispatch._choose.cache_clear()
        dispatch._announce.cache_clear()

    forget()
    yield forget
    forget()
