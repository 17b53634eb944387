"""How seconds and memory grow with the picture: seconds for each megapixel of output, bytes for each further pixel.

    python -m benchmarks.growth tiny-w4a4 --sizes 256 500 1000 2000 --output benchmarks/results/growth_NAME.json

The smallest size fits in one tile, the others take more and more of them. Every call is in a process of its own, so that its
peak of memory is its own; a small call before it does not count. OUTPUT gets the numbers, and a plot beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.footprint import in_own_process
from qartsr_pipeline.calibration.data.fingerprint import processor, versions
from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.calibration.saving import write_whole


def measure(model: str, size: int, scale: int, rounds: int, threads: int, tile_size: int) -> dict[str, Any]:
    """Medians over fresh processes, for a square picture of ``size`` pixels a side."""
    runs = [in_own_process(model, size, calls=1, warm_up=1, threads=threads, tile_size=tile_size) for _ in range(rounds)]
    megapixels = (size * scale) ** 2 / 1e6
    seconds = [run["seconds"][0] for run in runs]
    return {
        "size": size,
        "megapixels": megapixels,
        "tiles": runs[0]["tiles"],
        "seconds": seconds,
        "seconds_per_megapixel": statistics.median(seconds) / megapixels,
        "peak_megabytes": statistics.median(run["peak_mb"] for run in runs),
    }


def bytes_per_pixel(rows: list[dict[str, Any]]) -> float | None:
    """By which the peak grows for every output pixel, over pictures of more than one tile (least squares)."""
    tiled = [row for row in rows if row["tiles"] > 1]
    if len(tiled) < 2:
        return None
    return float(np.polyfit([row["megapixels"] for row in tiled], [row["peak_megabytes"] for row in tiled], 1)[0])


def deviation(rows: list[dict[str, Any]]) -> float | None:
    """Of the seconds per megapixel from their mean, the largest, as a share of it, over pictures of more than one tile."""
    seconds = [row["seconds_per_megapixel"] for row in rows if row["tiles"] > 1]
    if len(seconds) < 2:
        return None
    mean = statistics.fmean(seconds)
    return max(abs(one - mean) for one in seconds) / mean


def table(result: dict[str, Any]) -> str:
    lines = [
        "| output, megapixels | tiles | seconds | seconds per megapixel | peak, MB |",
        "| --: | --: | --: | --: | --: |",
    ]
    for row in result["rows"]:
        seconds = statistics.median(row["seconds"])
        shown = f"{row['megapixels']:.2f} | {row['tiles']} | {seconds:.1f} | {row['seconds_per_megapixel']:.2f}"
        lines.append(f"| {shown} | {row['peak_megabytes']:.0f} |")
    growth, off = result["bytes_per_pixel"], result["largest_deviation"]
    if growth is not None:
        lines.append(f"\n{growth:.0f} bytes for each further output pixel")
    if off is not None:
        lines.append(f"\nSeconds per megapixel: {100 * off:.0f} % at most off the mean over pictures of more than one tile")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure, rows = Figure(figsize=(9, 4), layout="constrained"), result["rows"]
    left, right = figure.subplots(1, 2)
    megapixels = [row["megapixels"] for row in rows]
    left.plot(megapixels, [row["seconds_per_megapixel"] for row in rows], marker="o")
    left.set(xlabel="output, megapixels", ylabel="seconds per megapixel", ylim=(0, None), xscale="log")
    right.plot(megapixels, [row["peak_megabytes"] / 1e3 for row in rows], marker="o")
    right.set(xlabel="output, megapixels", ylabel="peak memory of the process, GB", ylim=(0, None))
    figure.suptitle(f"{result['model']}, {result['processor']}, {result['threads']} threads")
    write_whole(path, png_of(figure))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="folder or name of a shipped model")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 500, 1000, 2000], help="sides of the input, in pixels")
    parser.add_argument("--scale", type=int, default=4, help="of the model (default: 4)")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each size (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tile-size", type=int, default=1024, help="side of the tiles, enlarged, in pixels (default: 1024)")
    parser.add_argument("--output", type=Path, required=True, help="the JSON report; the plot has its name")
    args = parser.parse_args(argv)
    rows = []
    for size in args.sizes:
        rows.append(measure(args.model, size, args.scale, args.rounds, args.threads, args.tile_size))
        print(rows[-1], flush=True)
    result = {"model": args.model, "rows": rows, "bytes_per_pixel": bytes_per_pixel(rows), "threads": args.threads}
    result |= {"tile_size": args.tile_size, "largest_deviation": deviation(rows)}
    result |= {"processor": processor(), "versions": versions()}
    write_whole(args.output, (json.dumps(result, indent=1) + "\n").encode())
    plot(result, args.output.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
