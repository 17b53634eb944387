"""The one format and the tables of `python -m benchmarks`."""

import json
import multiprocessing
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.footprint import growth
from benchmarks.result import Result, read_result
from benchmarks.speed import ask, table

RESULTS = Path(__file__).parents[1] / "benchmarks/results"
KEPT = {path.stem: path for path in RESULTS.glob("*.json") if not path.stem.startswith(("quality", "comparison"))}


@pytest.mark.parametrize("name", sorted(KEPT))
def test_published_results_give_a_table(name: str, tmp_path, capsys):
    copied = tmp_path / f"{name}.json"
    copied.write_bytes(KEPT[name].read_bytes())
    main(["table", str(copied)])
    result, lines = read_result(copied), capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|") and not line.startswith("| :--") for line in lines) > len(result.rows)
    if result.benchmark == "speed":
        assert all(any(line.startswith(f"| {row['name']} |") for line in lines) for row in result.rows)
    if name == "growth_tiny_w4a4_cpu_avx2":
        assert "tiny-w4a4: 41 bytes for each further output pixel" in "\n".join(lines)
    assert copied.with_suffix(".png").is_file() == (result.benchmark in ("speed", "footprint", "timesteps"))


def test_what_is_written_is_read_and_what_is_no_result_is_refused(tmp_path):
    result = Result("seams", {"images": []}, [{"whole": 1.0}], environment={"hardware": "a processor"})
    result.write(tmp_path / "new" / "seams.json")
    assert read_result(tmp_path / "new" / "seams.json") == result
    (tmp_path / "other.json").write_text(json.dumps({"rows": 1}))
    with pytest.raises(SystemExit) as refused:
        main(["table", str(tmp_path / "other.json")])
    assert refused.value.code == 2


def test_growth_is_that_of_images_of_several_tiles():
    rows = [{"tiles": n, "megapixels": n, "peak_megabytes": 100 + 40 * n, "seconds_per_megapixel": 9 + n} for n in (2, 4)]
    found = growth([{"tiles": 1, "megapixels": 1, "peak_megabytes": 1e6, "seconds_per_megapixel": 99}, *rows])
    assert found["bytes_per_pixel"] == pytest.approx(40) and found["largest_deviation"] == pytest.approx(1 / 12)
    assert growth(rows[:1]) == {"bytes_per_pixel": None, "largest_deviation": None}


def test_ratios_are_of_medians_and_failures_are_named():
    def row(name: str, *seconds: float) -> dict:
        rounds = [{"encode": s / 4, "unet": s / 4, "decode": s / 2} for s in seconds]
        facts = {"peak_mb": 100, "weights_mb": 3.25, "psnr_to_first": 40.0, "floats": "float32"}
        return facts | {"name": name, "rounds": rounds, "processor": [2 * s for s in seconds]}

    layers = {"unet.a": "W4A4, rank 8, onednn", "unet.b": "W4A4, rank 8, onednn", "vae.c": "W8A8, rank 0, float"}
    rows = [row("first", 1, 2, 6), row("ours W4A4", 1, 1, 1) | {"layers": layers}, row("slow", 30)]
    rows.append({"name": "broken", "rounds": [], "error": "RuntimeError: no\nmore"})
    setting = {"shape": "sd21", "size": 512, "rounds": 3, "device": "cpu"}
    text = table(Result("speed", setting, rows, environment={"hardware": "a processor"}))
    assert "RANDOM weights" in text and "a processor" in text
    assert "| first | float32 | 2.000 (1.000-6.000) | 1.00 | 4.000 | 1.00 | 0.500 | 0.500 | 1.000 | 100 | 3.2 | 40.0 |" in text
    assert "| ours W4A4 | float32 | 1.000 (1.000-1.000) | 0.50 | 2.000 | 0.50 |" in text
    assert "| slow | float32 | 30.000 (one round) | 15.00 |" in text
    assert "| broken | RuntimeError: no |" in text
    assert "- ours W4A4: W4A4, rank 8, onednn x 2; W8A8, rank 0, float x 1" in text


def test_a_process_that_is_gone_is_an_error_like_others():
    here, there = multiprocessing.Pipe()
    there.send({"peak_mb": 1})
    there.close()
    assert ask(here) == {"peak_mb": 1} and "has ended" in ask(here)["error"] and "has ended" in ask(here, "time")["error"]
