"""What the nodes cost in a real ComfyUI: how much later the server answers with them, and seconds and memory of an upscale.

    COMFYUI_PATH=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/.venv/bin/python python -m benchmarks run comfyui --output FILE.json

Every number is of a server process of its own. Seconds of an upscale are those of the whole graph (load, upscale, save) as
ComfyUI's own messages tell them: first with the model to be loaded, then again with another seed and the model at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.result import Result, markdown

ROOT = Path(__file__).resolve().parents[1]

# The server that the tests start. They are no package, so it is loaded from its file.
_spec = importlib.util.spec_from_file_location("comfyui_server", ROOT / "tests" / "comfyui" / "server.py")
server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(server)
Server, upscale_graph = server.Server, server.upscale_graph

SAMPLE = ROOT / "qartsr_pipeline" / "samples" / "rider.jpg"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", default=["tiny-fp", "tiny-w4a4"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="sides of the input, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="starts of the server, with and without (default: 3)")


def seconds_to_answer(installed: bool) -> float:
    """From the start of the process to its first answer."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder) / "base")
        if not installed:
            (server.base / "custom_nodes" / server.name).unlink()
        start = time.monotonic()
        with server:
            return time.monotonic() - start


def peak_megabytes(server: Server) -> float:
    """Resident memory of the server's process at its highest so far (Linux)."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e6


def upscale(model: str, size: int) -> dict[str, Any]:
    """Of a square image, in a new server."""
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "base") as server:
        Image.open(SAMPLE).resize((size, size), Image.Resampling.BICUBIC).save(server.base / "input" / "picture.png")
        before, seconds = peak_megabytes(server), []
        system = server.get("/system_stats")["system"]
        for seed in (0, 1):
            graph = upscale_graph("picture.png", model, seed=seed)
            del graph["3"]["inputs"]["mask"]
            status = server.finish(server.start(graph), seconds=3600)["status"]
            times = {kind: content["timestamp"] for kind, content in status["messages"]}
            if "execution_success" not in times:
                raise RuntimeError(f"{model} at {size}: {status['messages'][-1]}")
            seconds.append((times["execution_success"] - times["execution_start"]) / 1000)
        peak = peak_megabytes(server)
    row = {"model": model, "size": size, "seconds_loading": seconds[0], "seconds": seconds[1]}
    versions = {name: system[name] for name in ("comfyui_version", "pytorch_version", "python_version")}
    return row | {"server_megabytes": round(before), "peak_megabytes": round(peak), "versions": versions}


def measure(args: argparse.Namespace) -> Result:
    """A row for each model and size; the summary has the seconds until the server answers, with and without the nodes."""
    if "COMFYUI_PATH" not in os.environ:
        raise ValueError("COMFYUI_PATH is not set: give the folder of a ComfyUI checkout, see docs/comfyui.md")
    starts: dict[bool, list[float]] = {False: [], True: []}
    seconds_to_answer(True)  # reads everything from the disk once, which does not count
    for number in range(args.rounds):
        for installed in (number % 2 == 0, number % 2 == 1):
            starts[installed].append(seconds_to_answer(installed))
    rows = []
    for size in args.sizes:
        for model in args.models:
            rows.append(upscale(model, size))
            print(rows[-1], flush=True)
    return Result("comfyui", {"rounds": args.rounds}, rows, {"start_without": starts[False], "start_with": starts[True]})


def table(result: Result) -> str:
    """Markdown."""
    head = ["model and side of the input", "seconds, loading", "seconds", "server, MB", "peak, MB"]
    rows = [
        [f"{row['model']}, {row['size']}", f"{row['seconds_loading']:.1f}", f"{row['seconds']:.1f}",
         str(row["server_megabytes"]), str(row["peak_megabytes"])]
        for row in result.rows
    ]  # fmt: skip
    starts = [f"{name.replace('_', ' ')}: {statistics.median(found):.2f} s" for name, found in result.summary.items()]
    return "\n".join([markdown(head, rows), "", *starts])
