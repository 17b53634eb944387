"""Fixtures shared by all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # so that tests in sub-folders can import tiny_models

from qartsr_pipeline.calibration.report.report import Page  # noqa: E402
from tiny_models import build_tiny_pipeline  # noqa: E402

DRAWN = Page.plot


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _plots_are_left_out():
    """Drawing the plots of a report, or of a retraining, takes longer than quantizing a tiny model. Most tests do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Page, "plot", lambda page, name, draw, description: "")
        patch.setattr("qartsr_pipeline.calibration.retraining.trainer.plot_if_possible", lambda *_: False)
        yield


@pytest.fixture
def plots(monkeypatch):
    """Reports with their plots."""
    monkeypatch.setattr(Page, "plot", DRAWN)


@pytest.fixture
def tiny_pipeline():
    """A small random QArtSRPipeline (seed 0), fresh for every test."""
    return build_tiny_pipeline(seed=0)


@pytest.fixture
def tiny_folder(tiny_pipeline, tmp_path):
    """Folder of the saved `tiny_pipeline`."""
    folder = tmp_path / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def torchs_own_rounding(request, monkeypatch):
    """Without numba's loops but in their own tests: norms are rounded otherwise there, and a code at a tie is then the next one,
    which comparisons bit for bit would find. Integers from the same floats are equal, as `kernels/test_compiled.py` holds."""
    if request.module.__name__.rpartition(".")[2] != "test_compiled":
        monkeypatch.setattr("qartsr_pipeline.kernels.compiled.works", lambda: False)
