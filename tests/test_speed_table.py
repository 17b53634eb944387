"""The table that `benchmarks.speed` makes of what it measured."""

import json
import multiprocessing
from pathlib import Path

import pytest

from benchmarks.speed import ask, report

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks/results").glob("speed_*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_published_results_give_a_table(path: Path):
    result = json.loads(path.read_text())
    table = report(result).splitlines()
    for row in result["rows"]:
        assert any(line.startswith(f"| {row['name']} |") for line in table)


def test_ratios_are_of_medians_and_failures_are_named():
    def row(name: str, *seconds: float) -> dict:
        rounds = [{"encode": s / 4, "unet": s / 4, "decode": s / 2} for s in seconds]
        return {"name": name, "rounds": rounds, "peak_mb": 100, "weights_mb": 3.25, "psnr_to_first": 40.0, "floats": "float32"}

    layers = {"unet.a": "W4A4, rank 8, onednn", "unet.b": "W4A4, rank 8, onednn", "vae.c": "W8A8, rank 0, float"}
    rows = [row("first", 1, 2, 6), row("ours W4A4", 1, 1, 1) | {"layers": layers}, row("slow", 30)]
    rows.append({"name": "broken", "rounds": [], "error": "RuntimeError: no\nmore"})
    setting = {"shape": "sd21", "size": 512, "rounds": 3, "device": "cpu"}
    table = report({"setting": setting, "hardware": "a processor", "rows": rows})
    assert "RANDOM weights" in table and "a processor" in table
    assert "| first | float32 | 2.000 (1.000-6.000) | 1.00 | 0.500 | 0.500 | 1.000 | 100 | 3.2 | 40.0 |" in table
    assert "| ours W4A4 | float32 | 1.000 (1.000-1.000) | 0.50 |" in table
    assert "| slow | float32 | 30.000 (one round) | 15.00 |" in table
    assert "| broken | RuntimeError: no |" in table
    assert "- ours W4A4: W4A4, rank 8, onednn x 2; W8A8, rank 0, float x 1" in table


def test_a_process_that_is_gone_is_an_error_like_others():
    here, there = multiprocessing.Pipe()
    there.send({"peak_mb": 1})
    there.close()
    assert ask(here) == {"peak_mb": 1} and "has ended" in ask(here)["error"] and "has ended" in ask(here, "time")["error"]
