"""What the nodes cost in a real ComfyUI: how much later the server answers with them, and seconds and memory of an upscale.

    COMFYUI_PATH=~/ComfyUI COMFYUI_PYTHON=~/ComfyUI/.venv/bin/python python -m benchmarks.comfyui --output FILE.json

Every number is of a server process of its own. Seconds of an upscale are those of the whole graph (load, upscale, save) as
ComfyUI's own messages tell them: first with the model to be loaded, then again with another seed and the model at hand.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from qartsr_pipeline.calibration.data.fingerprint import processor
from qartsr_pipeline.calibration.saving import write_whole

ROOT = Path(__file__).resolve().parents[1]

# The server that the tests start. They are no package, so it is loaded from its file.
_spec = importlib.util.spec_from_file_location("comfyui_server", ROOT / "tests" / "comfyui" / "server.py")
server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(server)
Server, upscale_graph = server.Server, server.upscale_graph

SAMPLE = ROOT / "qartsr_pipeline" / "samples" / "rider.jpg"


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
    """Of a square picture, in a new server."""
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["tiny-fp", "tiny-w4a4"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512], help="sides of the input, in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="starts of the server, with and without (default: 3)")
    parser.add_argument("--output", type=Path, required=True, help="the JSON report")
    args = parser.parse_args(argv)
    if "COMFYUI_PATH" not in os.environ:
        parser.error("COMFYUI_PATH is not set: give the folder of a ComfyUI checkout, see docs/comfyui.md")
    starts: dict[bool, list[float]] = {False: [], True: []}
    seconds_to_answer(True)  # reads everything from the disk once, which does not count
    for number in range(args.rounds):
        for installed in (number % 2 == 0, number % 2 == 1):
            starts[installed].append(seconds_to_answer(installed))
    result = {f"start_{'with' if installed else 'without'}": found for installed, found in starts.items()}
    print({name: round(statistics.median(found), 2) for name, found in result.items()}, flush=True)
    result["upscales"] = []
    for size in args.sizes:
        for model in args.models:
            result["upscales"].append(upscale(model, size))
            print(result["upscales"][-1], flush=True)
    result |= {"processor": processor(), "cores": os.cpu_count()}
    write_whole(args.output, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
