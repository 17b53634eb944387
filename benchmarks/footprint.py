"""Seconds and peak memory of whole calls, model against model.

    python -m benchmarks.footprint tiny-fp tiny-w8a8 tiny-w4a4 --sizes 128 512 --output benchmarks/results/footprint_NAME.json

Every model and size runs in a process of its own, so that the peak is its own; the processes take turns over the rounds, and the
median over all calls is what counts. Ratios are against the first model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.machine import peak_megabytes
from qartsr_pipeline.calibration.data.fingerprint import processor

WARM_UP = 128  # pixels a side of the pictures of calls that do not count, at most


def measure(model: str, size: int, calls: int, warm_up: int, threads: int, tile_size: int | None = None) -> dict[str, object]:
    """In this process: seconds of each call on a square picture of ``size`` pixels, and the peak resident memory in MB."""
    import numpy as np
    import torch

    from qartsr_pipeline import QArtSRPipeline

    torch.set_num_threads(threads)
    pipeline = QArtSRPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    picture = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    before = peak_megabytes("cpu")
    for _ in range(warm_up):
        pipeline(picture[:WARM_UP, :WARM_UP])
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        pipeline(picture, tile_size=tile_size)
        seconds.append(time.perf_counter() - start)
    peak = peak_megabytes("cpu")
    return {"seconds": seconds, "peak_mb": peak, "loaded_mb": before, "tiles": pipeline.num_timesteps}


def in_own_process(
    model: str, size: int, calls: int, warm_up: int, threads: int, tile_size: int | None = None
) -> dict[str, object]:
    """`measure` in a fresh process; ends the program with the process's own message when that fails."""
    command = [sys.executable, "-m", "benchmarks.footprint", model, "--sizes", str(size), "--calls", str(calls)]
    command += ["--warm-up", str(warm_up), "--threads", str(threads), "--one"]
    command += [] if tile_size is None else ["--tile-size", str(tile_size)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if result.returncode:
        raise SystemExit(f"{model}, {size}: {result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", help="folders or names of shipped models; ratios are against the first")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="side of the input pictures in pixels")
    parser.add_argument("--calls", type=int, default=2, help="counted calls of a process")
    parser.add_argument("--warm-up", type=int, default=1, help="calls before them that do not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tile-size", type=int, help="side of the tiles, enlarged (default: what free memory allows)")
    parser.add_argument("--output", help="the JSON report")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.models[0], args.sizes[0], args.calls, args.warm_up, args.threads, args.tile_size)))
        return
    rows = []
    print("| input | model | seconds | ratio | peak MB | of it above the loaded model | tiles |")
    print("| --: | :-- | --: | --: | --: | --: | --: |")
    for size in args.sizes:
        runs: dict[str, list] = {model: [] for model in args.models}
        for _ in range(args.rounds):
            for model in args.models:
                runs[model].append(in_own_process(model, size, args.calls, args.warm_up, args.threads))
        first = None
        for model, found in runs.items():
            seconds = statistics.median(s for run in found for s in run["seconds"])
            first = first or seconds
            peak, loaded = (statistics.median(run[key] for run in found) for key in ("peak_mb", "loaded_mb"))
            row = {"input": size, "model": Path(model).name, "seconds": seconds, "ratio": seconds / first, "peak_mb": peak}
            row |= {"call_mb": peak - loaded, "tiles": found[0]["tiles"]}
            rows.append(row)
            print("| {input} | {model} | {seconds:.2f} | {ratio:.2f} | {peak_mb:.0f} | {call_mb:.0f} | {tiles} |".format(**row))
    if args.output:
        import torch

        hardware = {"processor": processor(), "threads": args.threads, "torch": torch.__version__}
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps({"hardware": hardware, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
