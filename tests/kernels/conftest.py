"""Tests here exchange backends, or what the machine can: no choice may be remembered from one to the next."""

import pytest

from qartsr_pipeline.kernels import dispatch


@pytest.fixture(autouse=True)
def forget_choices():
    """Call it to forget within a test, too."""
    dispatch._choose.cache_clear()
    yield dispatch._choose.cache_clear
    dispatch._choose.cache_clear()
