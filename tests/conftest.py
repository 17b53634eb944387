"""Fixtures shared by all tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))  # so that tests in sub-folders can import tiny_models

from tiny_models import build_tiny_pipeline  # noqa: E402


@pytest.fixture(autouse=True)
def _same_random_numbers_in_every_run():
    torch.manual_seed(0)


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
