"""Seconds and peak memory of whole calls, by model and size of the image, and how both grow with it.

Every call that counts is in a process of its own for each model and size, so that the peak is its own; the processes take turns
over the rounds, and medians over all calls are what counts. Ratios are against the first model. Where several sizes take more
than one tile, the summary has the bytes for each further output pixel, and how far seconds per megapixel are off their mean.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import Result, alone, markdown, peak_megabytes
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.whole_files import write_whole

WARM_UP = 128  # pixels a side of the images of calls that do not count, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="folders or names of shipped models; ratios are against the first")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="sides of the input, in pixels")
    parser.add_argument("--calls", type=int, default=2, help="counted calls of a process (default: 2)")
    parser.add_argument("--warm-up", type=int, default=1, help="calls before them that do not count (default: 1)")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each model and size (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tile-size", type=int, help="side of the tiles, enlarged (default: what free memory allows)")


def call(model: str, size: int, args: argparse.Namespace) -> dict[str, Any]:
    """In this process: seconds of each call on a square image of ``size`` pixels, and the peak of resident memory in MB."""
    torch.set_num_threads(args.threads)
    pipeline = QArtSRPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    loaded = peak_megabytes("cpu")
    for _ in range(args.warm_up):
        pipeline(image[:WARM_UP, :WARM_UP])
    seconds = []
    for _ in range(args.calls):
        start = time.perf_counter()
        pipeline(image, tile_size=args.tile_size)
        seconds.append(time.perf_counter() - start)
    tiles, scale = pipeline.num_timesteps, pipeline.config.scale
    return {"seconds": seconds, "peak": peak_megabytes("cpu"), "loaded": loaded, "tiles": tiles, "scale": scale}


def measure(args: argparse.Namespace) -> Result:
    """A row for each size and model."""
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        runs: dict[str, list[dict[str, Any]]] = {model: [] for model in args.models}
        for _ in range(args.rounds):
            for model in args.models:
                runs[model].append(alone(call, model, size, args))
        first = None
        for model, found in runs.items():
            seconds = [one for run in found for one in run["seconds"]]
            median, megapixels = statistics.median(seconds), (size * found[0]["scale"]) ** 2 / 1e6
            first = first or median
            peak, loaded = (statistics.median(run[key] for run in found) for key in ("peak", "loaded"))
            row = {"model": Path(model).name, "size": size, "megapixels": megapixels, "tiles": found[0]["tiles"]}
            row |= {"seconds": seconds, "seconds_per_megapixel": median / megapixels, "ratio": median / first}
            rows.append(row | {"peak_megabytes": peak, "loaded_megabytes": loaded})
            print(rows[-1], flush=True)
    summary = {name: growth([row for row in rows if row["model"] == name]) for name in dict.fromkeys(r["model"] for r in rows)}
    settings = {name: getattr(args, name) for name in ("models", "calls", "warm_up", "rounds", "tile_size")}
    return Result("footprint", settings, rows, summary)


def growth(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of images of more than one tile: bytes by which the peak grows for every output pixel (least squares), and the largest
    deviation of the seconds per megapixel from their mean, as a share of it. None with fewer than two such images.
    """
    tiled = [row for row in rows if row["tiles"] > 1]
    if len(tiled) < 2:
        return {"bytes_per_pixel": None, "largest_deviation": None}
    slope = np.polyfit([row["megapixels"] for row in tiled], [row["peak_megabytes"] for row in tiled], 1)[0]
    seconds = [row["seconds_per_megapixel"] for row in tiled]
    mean = statistics.fmean(seconds)
    return {"bytes_per_pixel": float(slope), "largest_deviation": max(abs(one - mean) for one in seconds) / mean}


def table(result: Result) -> str:
    head = [
        "model",
        "output, megapixels",
        "tiles",
        "seconds",
        "ratio",
        "s per megapixel",
        "peak, MB",
        "above the model, MB",
    ]
    rows = []
    for row in result.rows:
        seconds, loaded = statistics.median(row["seconds"]), row["loaded_megabytes"]
        cells = [row["model"], f"{row['megapixels']:.2f}", str(row["tiles"]), f"{seconds:.2f}", f"{row['ratio']:.2f}"]
        above = "" if loaded is None else f"{row['peak_megabytes'] - loaded:.0f}"
        rows.append([*cells, f"{row['seconds_per_megapixel']:.2f}", f"{row['peak_megabytes']:.0f}", above])
    lines = [
        f"{name}: {found['bytes_per_pixel']:.0f} bytes for each further output pixel; seconds per megapixel"
        f" {100 * found['largest_deviation']:.0f} % at most off the mean over images of more than one tile"
        for name, found in result.summary.items()
        if found["bytes_per_pixel"] is not None
    ]
    return "\n\n".join([markdown(head, rows), *lines])


def plot(result: Result, path: Path) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model in dict.fromkeys(row["model"] for row in result.rows):
        rows = [row for row in result.rows if row["model"] == model]
        megapixels = [row["megapixels"] for row in rows]
        left.plot(megapixels, [row["seconds_per_megapixel"] for row in rows], marker="o", label=model)
        right.plot(megapixels, [row["peak_megabytes"] / 1e3 for row in rows], marker="o", label=model)
    left.set(xlabel="output, megapixels", ylabel="seconds per megapixel", ylim=(0, None), xscale="log")
    right.set(xlabel="output, megapixels", ylabel="peak memory of the process, GB", ylim=(0, None))
    left.legend()
    figure.suptitle(result.environment["hardware"])
    write_whole(path, png_of(figure))
