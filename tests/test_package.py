"""`import qartsr_pipeline`: quick, and its names lead to what they say."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

import qartsr_pipeline
from qartsr_pipeline.calibration.recipe_files import load_recipe
from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.kernels import list_backends, use_backend
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline, QArtSRPipelineOutput


def in_a_fresh_process(code: str) -> list[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_package_and_the_command_line_import_nothing_heavy():
    code = "import sys, qartsr_pipeline, qartsr_pipeline.cli.main\nprint(*sys.modules)"
    assert not {"torch", "diffusers", "transformers", "numpy"} & set(in_a_fresh_process(code))


def test_the_names_are_those_of_their_modules():
    for one in (QArtSRPipeline, QArtSRPipelineOutput, CheckpointError, list_backends, use_backend):
        assert getattr(qartsr_pipeline, one.__name__) is one
    assert set(qartsr_pipeline.__all__) == set(qartsr_pipeline._MODULES) <= set(dir(qartsr_pipeline))


@pytest.mark.parametrize("function", [list_backends, load_recipe, use_backend])
def test_the_examples_of_the_docstrings_run(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert doctest.DocTestRunner().run(example) == (0, len(example.examples)) and example.examples


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'QArtSRPipelines'"):
        _ = qartsr_pipeline.QArtSRPipelines
