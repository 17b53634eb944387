"""Seconds, memory and error of a whole enlargement: ours against peers, in one run, in turns.

    python -m benchmarks run speed --shape tiny --size 512 --output FILE.json
    python -m benchmarks run speed --shape sd21 --device cuda --contenders fp32 bf16 "ours W4A4" --output FILE.json

Every contender lives in a process of its own, so that its peak of memory is its own; the processes take turns, one at a time.
Medians and ranges over the rounds; ratios are against the first contender, and who is `PATIENCE` times slower is timed in the
first round only. "Processor" is the processor time of a whole enlargement, in all threads together; with `--threads 1` it can
be compared on a machine that does other work, too. `--size` is the side of the enlarged picture. Peers that are not installed
are left out: torchao comes with `pip install -e .[bench]`, sdnq is installed by hand, for its licence. The JSON has bits, rank
and kernel of every layer of ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, WITHOUT_DATA
from benchmarks.result import Result, forget_peak, peak_megabytes
from qartsr_pipeline.calibration.report.report_plots import png_of
from qartsr_pipeline.whole_files import write_whole

PATIENCE = 10
TITLES = {
    "tiny": "the small models that ship",
    "sd21": "Stable Diffusion 2.1's shape with RANDOM weights: about speed and memory only, errors mean nothing",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=tuple(TITLES), default="tiny")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contenders", nargs="+", choices=tuple(CONTENDERS), metavar="NAME", help="; ".join(CONTENDERS))
    parser.add_argument("--alone", action="store_true", help="one contender after the other, where memory is short: no turns")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())


def work(connection: Connection, name: str, args: argparse.Namespace) -> None:
    """A contender's process: builds it, then runs it as often as it is told to."""
    import torch

    from qartsr_pipeline.cli.timing import OperatorTimes, tensor_bytes, time_stages

    torch.set_num_threads(args.threads)
    try:
        network = CONTENDERS[name].build(args.shape, args.device)
        dtype = next(p.dtype for p in network.vae.parameters() if p.dtype.is_floating_point)
        up = torch.rand(1, 3, args.size, args.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        up = torch.nn.functional.avg_pool2d(up, 9, 1, 4).mul(4).clamp(-1, 1).to(args.device, dtype)
        forget_peak(args.device)  # of building: contenders that are made of float32 weights have them no more
        loaded, picture = peak_megabytes(args.device), time_stages(network, up)[1]
        connection.send({"loaded_mb": loaded, "picture": picture.float().cpu().numpy()})
        while (order := connection.recv()) == "time":
            begun = time.process_time()
            stages = time_stages(network, up)[0]
            connection.send({"stages": stages, "processor": time.process_time() - begun})
        facts: dict[str, Any] = {"peak_mb": peak_megabytes(args.device), "weights_mb": tensor_bytes(network) / 1e6}
        facts |= {"floats": str(dtype).removeprefix("torch."), "layers": layers_of(network)}
        times = OperatorTimes(network.device)
        if order == "kinds" and "compiled" not in name:
            with times:
                time_stages(network, up)
        connection.send(facts | {"kinds": times.seconds})
    except Exception as error:  # told to the parent, which goes on without this contender
        connection.send({"error": f"{type(error).__name__}: {error}"})


def layers_of(network: Any) -> dict[str, str]:
    """Bits, rank and kernel of every quantized layer of ours, such as "W4A4, rank 8, onednn"."""
    from qartsr_pipeline.kernels import choose_backend
    from qartsr_pipeline.quantization.deployed import DeployedLayer

    return {
        f"{part}.{name}": f"W{layer.spec.weight_bits}A{layer.spec.activation_bits}, rank {layer.spec.rank}, "
        + choose_backend(layer.spec, network.device.type).name
        for part in ("unet", "vae")
        for name, layer in getattr(network, part).named_modules()
        if isinstance(layer, DeployedLayer)
    }


def ask(pipe: Connection, order: str | None = None) -> dict[str, Any]:
    """The answer of a contender's process, which may be gone, to an order, or what it says by itself."""
    try:
        if order:
            pipe.send(order)
        return pipe.recv()
    except (EOFError, OSError):
        return {"error": "the process has ended: was there too little memory?"}


def measure(args: argparse.Namespace) -> Result:
    """A row a contender; those that fail have an "error"."""
    import torch

    usual = [n for n, c in CONTENDERS.items() if c.listed and c.installed and args.device in c.devices]
    args.contenders = args.contenders or usual
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    torch.set_num_threads(args.threads)
    setting = {"shape": args.shape, "size": args.size, "rounds": args.rounds, "device": args.device}
    setting |= {"capability": torch.backends.cpu.get_cpu_capability(), "alone": args.alone}
    together = [[name] for name in args.contenders] if args.alone else [args.contenders]
    rows = [row for names in together for row in time_in_turns(names, args)]
    return Result("speed", setting, with_errors(rows))


def with_errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with each picture's distance to the first one, in the place of the picture."""
    import numpy as np

    pictures = [row.pop("picture", None) for row in rows]
    first = next((picture for picture, row in zip(pictures, rows, strict=True) if "error" not in row), None)
    for row, picture in zip(rows, pictures, strict=True):
        if "error" not in row:
            error = np.square(picture - first).mean()
            row["psnr_to_first"] = float(10 * np.log10(4 / error)) if error else None
    return rows


def time_in_turns(names: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of contenders that are loaded together; each still has its picture."""
    context = multiprocessing.get_context("spawn")
    pipes, processes, rows = {}, [], {}
    for name in names:
        print(f"loading {name}", file=sys.stderr, flush=True)
        pipes[name], other = context.Pipe()
        process = context.Process(target=work, args=(other, name, args), daemon=True)
        process.start()
        other.close()
        processes.append(process)
        rows[name] = {"name": name, "rounds": [], "processor": []} | ask(pipes[name])
    alive = [name for name in names if "error" not in rows[name]]
    timed = alive
    for turn in range(args.rounds):
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
        for name in timed:
            found = ask(pipes[name], "time")
            if "error" in found:
                rows[name] |= found
                continue
            rows[name]["rounds"].append(found["stages"])
            rows[name]["processor"].append(found["processor"])
        alive = [name for name in alive if "error" not in rows[name]]
        seconds = {name: sum(rows[name]["rounds"][0].values()) for name in alive}
        timed = [name for name in timed if name in alive and seconds[name] < PATIENCE * seconds[alive[0]]]
    for name, process in zip(names, processes, strict=True):
        if name in alive:
            rows[name] |= ask(pipes[name], "kinds")
        process.join(60)  # before the next one is timed
        process.kill()
    return list(rows.values())


def table(result: Result) -> str:
    """Markdown."""
    setting = result.settings
    lines = [
        f"{setting['size']} x {setting['size']} pixels out, {TITLES[setting['shape']]}. {result.environment['hardware']}."
        f" Median (range) of {setting['rounds']} rounds, {'one after the other' if setting.get('alone') else 'in turns'}.\n",
        "| | floats | seconds | ratio | processor | ratio | encode | UNet | decode | peak MB | weights MB | dB to the first |",
        "| :-- | :-- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    base, processor_base = None, None
    for row in result.rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error'].splitlines()[0][:100]} | | | | | | | | | | |")
            continue
        sums = [sum(stages.values()) for stages in row["rounds"]]
        median = statistics.median(sums)
        processor = statistics.median(row["processor"]) if row.get("processor") else None  # results of before have none
        base, processor_base = base or median, processor_base or processor
        stages = [f"{statistics.median(r[stage] for r in row['rounds']):.3f}" for stage in row["rounds"][0]]
        decibels = row["psnr_to_first"]
        spread = f"({min(sums):.3f}-{max(sums):.3f})" if len(sums) == setting["rounds"] else "(one round)"
        cells = [row["name"], row.get("floats", ""), f"{median:.3f} {spread}", f"{median / base:.2f}"]
        cells += [f"{processor:.3f}", f"{processor / processor_base:.2f}"] if processor and processor_base else ["", ""]
        cells += stages
        means_nothing = decibels is None or row["name"] in WITHOUT_DATA
        cells += [f"{row['peak_mb']:.0f}", f"{row['weights_mb']:.1f}", "" if means_nothing else f"{decibels:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *kinds_table(result.rows), "", *layer_counts(result.rows)])


def layer_counts(rows: list[dict[str, Any]]) -> list[str]:
    """How many layers of ours have which bits, rank and kernel."""
    return [
        f"- {row['name']}: " + "; ".join(f"{what} x {count}" for what, count in Counter(row["layers"].values()).most_common())
        for row in rows
        if row.get("layers")
    ]


def kinds_table(rows: list[dict[str, Any]]) -> list[str]:
    """Seconds of each kind of operator (of layer, in earlier results), where they were timed."""
    rows = [row for row in rows if row.get("kinds")]
    kinds = sorted({kind for row in rows for kind in row["kinds"]})
    lines = [
        "| seconds by kind, one by one | " + " | ".join(kinds) + " |",
        "| :-- |" + " --: |" * len(kinds),
    ]
    return lines + [
        f"| {row['name']} | " + " | ".join(f"{row['kinds'].get(kind, 0):.3f}" for kind in kinds) + " |" for row in rows
    ]


def plot(result: Result, path: Path) -> None:
    """Seconds of the stages as stacked bars, with their sums; bars that are many times as long as most are cut off."""
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if "error" not in row]
    figure = Figure(figsize=(8, 0.6 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for stage in rows[0]["rounds"][0]:
        seconds = [statistics.median(r[stage] for r in row["rounds"]) for row in rows]
        axes.barh([row["name"] for row in rows], seconds, left=left, label=stage)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    longest = min(max(left), 2.5 * statistics.median(left))
    for line, row in enumerate(rows):
        total = statistics.median(sum(stages.values()) for stages in row["rounds"])
        place = (total, "left", "black") if total <= longest else (0.98 * longest, "right", "white")
        axes.text(place[0], line, f" {total:.3g} ", ha=place[1], va="center", color=place[2])
    axes.set_xlim(0, 1.1 * longest if max(left) == longest else longest)
    axes.invert_yaxis()
    axes.set_title(TITLES[result.settings["shape"]], fontsize="small")
    axes.set_xlabel("seconds")
    axes.legend(loc="lower right")
    write_whole(path, png_of(figure))
