"""Processor seconds and peak memory of clips, by model, float type and number of frames: as a stream, and from file to file.

    python -m benchmarks run clips video-fp video-w4a4 --dtypes float32 bfloat16 --output speed.json
    python -m benchmarks run clips video-w4a4 --frames 100 1000 --size 32 --ways stream file --rounds 1 --output long.json

Each run is in a process of its own, so that the peak is its own; the processes take turns over the rounds, and the fastest
counts. A few frames come first and do not count. From file to file is what `qartsr upscale` does, in lossless FFV1; its seconds
are the difference to those few frames. The clip is noise that moves.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.result import Result, alone, forget_peak, markdown, peak_megabytes
from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.cli.main import main as command

WARM_UP = 5  # frames
TARGETS = {"memory": 1.02, "seconds": 1.05}  # of the longest clip over the shortest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", help="folders or names of shipped models; ratios are against the first row")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--frames", type=int, nargs="+", default=[9], help="lengths of the clips (default: 9)")
    parser.add_argument("--size", type=int, default=48, help="side of the frames before they are enlarged (default: 48)")
    parser.add_argument("--ways", nargs="+", choices=("stream", "file"), default=["stream"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)


def moving_noise(size: int, count: int) -> Any:
    """Frames (size, size, 3) uint8, one after the other."""
    noise = np.random.default_rng(0).integers(0, 256, (2 * size, size, 3), dtype=np.uint8)
    for number in range(count):
        yield noise[number % size : number % size + size]


def streamed(model: str, dtype: str, count: int, size: int, threads: int) -> dict[str, float]:
    """In this process: processor seconds a frame, the peak of resident memory in MB, and that before the clip."""
    torch.set_num_threads(threads)
    pipeline = LSGQuantVideoPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    for _ in pipeline.stream(moving_noise(size, WARM_UP)):
        pass
    forget_peak("cpu")
    before, start = peak_megabytes("cpu"), time.process_time()
    for _ in pipeline.stream(moving_noise(size, count)):
        pass
    return {"seconds": (time.process_time() - start) / count, "peak": peak_megabytes("cpu"), "before": before}


def from_file_to_file(model: str, dtype: str, count: int, size: int, threads: int) -> dict[str, float]:
    """The same for `qartsr upscale`."""
    torch.set_num_threads(threads)
    spent, before = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for frames in (WARM_UP, WARM_UP, count):  # the first one also compiles
            forget_peak("cpu")
            before, clip = peak_megabytes("cpu"), Path(folder) / f"{frames}.mkv"
            _write_clip(clip, size, frames)
            start = time.process_time()
            arguments = ["upscale", str(clip), "-o", str(clip.with_suffix(".out.mkv")), "--model", model, "--dtype", dtype]
            code = command([*arguments, "--device", "cpu", "--codec", "ffv1", "--overwrite"])
            if code:
                raise ValueError(f"qartsr upscale ended with {code}")
            spent[frames] = time.process_time() - start
    seconds = (spent[count] - spent[WARM_UP]) / (count - WARM_UP)
    return {"seconds": seconds, "peak": peak_megabytes("cpu"), "before": before}


def _write_clip(path: Path, size: int, count: int) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = size
        stream.pix_fmt = "bgr0"
        for image in moving_noise(size, count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(stream.encode(None))


WAYS = {"stream": streamed, "file": from_file_to_file}


def measure(args: argparse.Namespace) -> Result:
    """A row for each model, float type, way and length."""
    torch.set_num_threads(args.threads)
    kinds = list(itertools.product(args.models, args.dtypes, args.ways, args.frames))
    runs: dict[tuple, list[dict[str, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for kind, found in runs.items():
            model, dtype, way, count = kind
            found.append(alone(WAYS[way], model, dtype, count, args.size, args.threads))
            print(kind, found[-1], flush=True)
    rows = []
    for (model, dtype, way, count), found in runs.items():
        fastest = {name: min(run[name] for run in found) for name in found[0]}
        row = {"model": Path(model).name, "dtype": dtype, "way": way, "frames": count, "seconds_per_frame": fastest["seconds"]}
        row["ratio"] = (rows[0] if rows else row)["seconds_per_frame"] / fastest["seconds"]
        rows.append(row | {"peak_megabytes": fastest["peak"], "before_megabytes": fastest["before"]})
    settings = {name: getattr(args, name) for name in ("size", "rounds")}
    return Result("clips", settings, rows, growth(rows))


def growth(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each model, float type and way: memory and seconds a frame of the longest clip over those of the shortest."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["frames"]):
        found.setdefault(f"{row['model']}, {row['dtype']}, {row['way']}", []).append(row)
    return {
        name: {
            "memory": each[-1]["peak_megabytes"] / each[0]["peak_megabytes"],
            "seconds": each[-1]["seconds_per_frame"] / each[0]["seconds_per_frame"],
        }
        for name, each in found.items()
        if len(each) > 1
    }


def table(result: Result) -> str:
    head = ["model", "floats", "way", "frames", "seconds a frame", "times as fast", "peak, MB", "before, MB"]
    rows = [
        [row["model"], row["dtype"], row["way"], str(row["frames"]), f"{row['seconds_per_frame']:.4f}", f"{row['ratio']:.2f}",
         f"{row['peak_megabytes']:.0f}", f"{row['before_megabytes']:.0f}"]
        for row in result.rows
    ]  # fmt: skip
    lines = [
        f"{name}: the longest clip takes {found['memory']:.3f} times the memory of the shortest (target {TARGETS['memory']:g}),"
        f" and {found['seconds']:.3f} times the seconds a frame (target {TARGETS['seconds']:g})."
        for name, found in result.summary.items()
    ]
    return "\n\n".join([markdown(head, rows), *lines])
