"""What a benchmark measured, in one JSON format; and memory as the system counts it."""

from __future__ import annotations

import json
import multiprocessing
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from qartsr_pipeline.calibration.data.fingerprint import hardware, versions
from qartsr_pipeline.whole_files import write_whole

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Result:
    """What `python -m benchmarks run NAME` writes.

    Attributes:
        benchmark: NAME.
        settings: what was asked for.
        rows: what was measured, one for each model, size, or whatever is compared.
        summary: what follows from several rows.
        environment: "command", "date", "commit", "hardware", "threads" and "versions"; results in older formats lack some.
    """

    benchmark: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all, and its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


def read_result(path: Path) -> Result:
    """Reads a result, also of the programs that came before this format.

    Raises:
        ValueError: not the result of a benchmark.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    try:
        return Result(**content) if "benchmark" in content else _from_before(content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the result of a benchmark ({type(error).__name__}: {error})") from error


def _from_before(old: dict[str, Any]) -> Result:
    """Results of `benchmarks.speed`, `.growth`, `.full_size`, `.full_size_folders`, `.timesteps` and `.released_quantizers`."""
    environment = {name: old[name] for name in ("hardware", "threads", "versions") if name in old}
    if "setting" in old:
        return Result("speed", old["setting"], old["rows"], environment=environment)
    if "bytes_per_pixel" in old:
        model, summary = old["model"], {name: old[name] for name in ("bytes_per_pixel", "largest_deviation")}
        rows = [{"model": model, "ratio": 1.0, "loaded_megabytes": None, **row} for row in old["rows"]]
        environment["hardware"] = old["processor"]
        return Result("footprint", {"models": [model], "tile_size": old["tile_size"]}, rows, {model: summary}, environment)
    if "stages" in old:
        rows = [{"stage": name, **stage} for name, stage in old["stages"].items()]
        summary = {name: value for name, value in old.items() if name not in ("stages", "recipe", "bits", *environment)}
        return Result("full-size", {"recipe": old["recipe"], "bits": old["bits"]}, rows, summary, environment)
    if "about" in old:
        widths = [name for name, value in old["rows"][0].items() if isinstance(value, dict)]
        return Result("timesteps", {"bits": widths}, old["rows"], {"about": old["about"]}, environment)
    if "rank" in old:
        return Result("full-size-folders", {"rank": old["rank"]}, old["rows"], environment=environment)
    found = old["largest relative difference"]
    rows = [{"quantizer": name, "bits": bits, **values} for name, each in found.items() for bits, values in each.items()]
    return Result("released-quantizers", {}, rows, environment=environment)


def environment(arguments: list[str], device: str = "cpu") -> dict[str, Any]:
    """Command, machine and versions of a run that ends now."""
    return {
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "date": date.today().isoformat(),
        "commit": _commit(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _commit() -> str | None:
    """The checkout's commit, with a plus sign if files differ from it; None outside of git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def peak_megabytes(device: str) -> float:
    """The most memory that this process has had so far: allocated on the GPU, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "linux":  # unlike getrusage's, this peak can be reset
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def forget_peak(device: str) -> None:
    """Resets the peak that `peak_megabytes` reports; impossible on a Mac, where it stays."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result from a fresh process, whose peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)
