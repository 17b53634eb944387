"""Several processes that share one calibration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes_for_tests import small_recipe

from qartsr_pipeline.calibration.training.workers import ALONE, Workers
from tiny_models import build_tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]
SMALL = "images=2 image_size=32 cached_batches=2 layer.branch_rank=4 budget.branch=0.1 layer.adapter_rank=2".split()
BATCHES = [f"stages.{number}.{setting}" for number in (0, 1) for setting in ("patch=16", "batch=2", "lr=0.0003")]


def test_a_batch_is_shared_without_a_rest():
    batch = torch.arange(12).view(6, 2)
    parts = [Workers(index, 3).part(batch) for index in range(3)]
    assert torch.equal(torch.cat(parts), batch) and {len(part) for part in parts} == {2}
    assert torch.equal(ALONE.part(batch), batch) and ALONE.mean(torch.tensor(2.5)) == 2.5
    recipe = small_recipe("stages.0.batch=6", "stages.1.batch=4")
    Workers(0, 2).check(recipe)
    with pytest.raises(ValueError, match=r"ET has 4 patches, which 3 processes .* --set stages\.1\.batch=6"):
        Workers(0, 3).check(recipe)


def command(processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """calibration/run.py, launched by accelerate if there is more than one process."""
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1"]
    launch += ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"]
    program = [sys.executable, *(launch if processes > 1 else []), "calibration/run.py", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "model")
    records = []
    for count in (1, 2):
        output = tmp_path / str(count)
        arguments = [tmp_path / "model", "--steps", 6, "--device", "cpu", "--output", output, "--set", *SMALL, *BATCHES]
        result = command(count, *arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("written:") == 2  # model and report, once
        records.append(json.loads((output / "model" / "quantization.json").read_text()))
    one, two = (record["loss"] for record in records)
    assert sum(len(losses) for losses in two.values()) == 6
    for stage, losses in one.items():
        assert two[stage] == pytest.approx(losses, rel=1e-2)  # a sum in another order may round a code the other way
    refused = command(2, tmp_path / "model", "--device", "cpu", "--output", tmp_path / "3", "--set", "stages.1.batch=3")
    assert refused.returncode != 0 and refused.stderr.count("has 3 patches, which 2 processes cannot share") == 1
