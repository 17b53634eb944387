"""The fuzz notices what it looks for: a wrong image, a hang, an unclear error, and code that was executed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / name) for name in ("quantization", "convert"))]

import folder_cases  # noqa: E402
import run  # noqa: E402
from folder_cases import Template  # noqa: E402
from judging import Failure, judge_error, judge_image  # noqa: E402

from qartsr_pipeline.checkpoint_files import CheckpointError, check_checkpoint  # noqa: E402


def raised(call) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: B017 - whatever it is, it is judged
        call()
    return caught.value


def test_our_errors_are_clear_and_others_are_not(tmp_path):
    judge_error(raised(lambda: check_checkpoint(tmp_path)), str(tmp_path))
    with pytest.raises(Failure, match="without /elsewhere"):
        judge_error(raised(lambda: check_checkpoint(tmp_path)), "/elsewhere")
    for call, words in (
        (lambda: [][0], "of a type that says nothing and not raised by this package and too short"),
        (lambda: int("x"), "not raised by this package"),
    ):
        with pytest.raises(Failure, match=words):
            judge_error(raised(call))


def test_a_wrong_image_is_a_failure():
    image = np.zeros((1, 4, 4, 3), "float32")
    judge_image(image, image.copy())
    for other in (image + 0.01, image * np.nan, image[:, :2]):
        with pytest.raises(Failure, match="without a word"):
            judge_image(other, image)


@pytest.mark.parametrize("fault", ["none", "wrong", "unclear", "executed"])
def test_a_case_fails_for_each_fault(tiny_folder, tmp_path, monkeypatch, fault):
    """`from_pretrained` is exchanged for one that has the fault."""

    class Pipeline:
        @staticmethod
        def from_pretrained(folder):
            if fault == "unclear":
                raise CheckpointError("broken")
            if fault == "executed":
                Path(os.environ["FUZZ_EXECUTED"]).mkdir()

    image = np.zeros((1, 4, 4, 3), "float32")
    monkeypatch.setattr(folder_cases, "QArtSRPipeline", Pipeline)
    monkeypatch.setattr(folder_cases, "enlarge", lambda pipeline: image + (fault == "wrong"))
    monkeypatch.setattr(folder_cases, "templates", lambda place: {"fp": Template(tiny_folder, image)})
    monkeypatch.setattr(folder_cases, "MUTATIONS", (lambda rng, folder: ("nothing", 1e-4),))
    if fault == "none":
        assert folder_cases.run_case(random.Random(0), tmp_path) == "fp: nothing"
        return
    with pytest.raises(
        Failure, match={"wrong": "wrong image", "unclear": "without a way out", "executed": "was executed"}[fault]
    ):
        folder_cases.run_case(random.Random(0), tmp_path)


def test_a_process_that_hangs_or_crashes_counts_once_and_the_others_go_on(monkeypatch):
    """Case 1 hangs, case 3 ends its process; both are named, and the five others are done."""
    program = (
        "import json, os, sys, time\n"
        "for n in json.loads(sys.argv[-1]):\n"
        "    print(json.dumps({'number': n}), flush=True)\n"
        "    time.sleep(60) if n == 1 else os._exit(7) if n == 3 else None\n"
        "    print(json.dumps({'number': n, 'failed': False, 'text': ''}), flush=True)\n"
    )
    popen = subprocess.Popen

    def start(command, **options):
        return popen([sys.executable, "-c", program, command[-1]], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(run, "LIMIT", 2.0)
    failures, done = [], [0]
    run.watch(list(range(7)), 0, failures, done)
    assert [number for number, _ in failures] == [1, 3] and done == [7]
    assert "code -9" in failures[0][1] and "code 7" in failures[1][1]
