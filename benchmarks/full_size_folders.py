"""Folders at the size of Stable Diffusion 2.1: bytes on disk, seconds to load and to enlarge 128 x 128 to 512 x 512, peak memory.

    python -m benchmarks run full-size-folders --output FILE.json

A pipeline with random weights is folded, quantized without data (bounds from the weights' extremes, branches of rank 32 from
their SVD, first and last layers at 8 bits), saved, loaded again by a process of its own, and run, in float32 where layers are not
integers (also what is stored in fp16). Its images are noise: only bytes and seconds mean something. The folders have neither
text encoder nor tokenizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.full_size import peak_gigabytes, write_random_model
from benchmarks.result import Result, alone, markdown
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_values
from qartsr_pipeline.calibration.report.pipeline_folder import folder_sizes
from qartsr_pipeline.calibration.start.branches import branch_from_weight
from qartsr_pipeline.calibration.start.schemes import fold_and_make_schemes
from qartsr_pipeline.quantization.calibrating import calibrating_layers, prepare
from qartsr_pipeline.quantization.freeze import freeze

RANK = 32
VARIANTS = {"fp16": 16, "w8a8": 8, "w4a4": 4, "w2a2": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--repeats", type=int, default=3, help="calls of each (default: 3)")
    parser.add_argument("--folder", type=Path, help="where 5 GB are free (default: a temporary folder)")


def quantize_from_weights(pipeline: QArtSRPipeline, bits: int) -> None:
    """In place: folded, and every layer quantized as the module's docstring says."""
    recipe = with_values(load_recipe("maxmin"), [f"layer.branch_rank={RANK}"])
    for component, scheme in fold_and_make_schemes(pipeline, recipe, (bits, bits)).items():
        model = prepare(getattr(pipeline, component), scheme)
        for layer in calibrating_layers(model).values():
            branch_from_weight(layer)
            layer.set_weight_bounds_to_extremes()
        freeze(model, scheme)


def make(full_precision: Path, target: Path, bits: int) -> dict[str, float]:
    """Writes one variant's folder; seconds, and peak memory of the process."""
    start = time.perf_counter()
    pipeline = QArtSRPipeline.from_pretrained(full_precision)
    quantize_from_weights(pipeline, bits)
    pipeline.save_pretrained(target)
    return {"make_seconds": round(time.perf_counter() - start, 1), "make_peak_gigabytes": round(peak_gigabytes("cpu"), 2)}


def use(folder: Path, repeats: int) -> dict[str, Any]:
    """Loads a folder and enlarges an image with it."""
    start = time.perf_counter()
    pipeline = QArtSRPipeline.from_pretrained(folder)
    loaded = time.perf_counter() - start
    pipeline.set_progress_bar_config(disable=True)
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        image = pipeline(Image.fromarray(pixels)).images[0]
        seconds.append(round(time.perf_counter() - start, 2))
        assert image.size == (512, 512)
    return {
        "load_seconds": round(loaded, 2),
        "first_seconds": seconds[0],
        "seconds": round(statistics.median(seconds[1:] or seconds), 2),
        "peak_gigabytes": round(peak_gigabytes("cpu"), 2),
    }


def table(result: Result) -> str:
    """Markdown."""
    heads = [
        "",
        "folder, MB",
        "of fp16",
        "load, s",
        "first call, s",
        "further calls, s",
        "peak, GB",
        "made in, s",
        "peak there, GB",
    ]
    keys = ("load_seconds", "first_seconds", "seconds", "peak_gigabytes", "make_seconds", "make_peak_gigabytes")
    return markdown(
        heads,
        [
            [row["name"], f"{row['megabytes']:.0f}", f"{row['of_fp16']:.3f}", *(str(row.get(key, "")) for key in keys)]
            for row in result.rows
        ],
    )


def measure(args: argparse.Namespace) -> Result:
    """A row for each variant."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        base = Path(temporary) / "fp16"
        alone(write_random_model, base)
        for name in args.variants:
            folder, row = Path(temporary) / name, {"name": name}
            if name != "fp16":
                row |= alone(make, base, folder, VARIANTS[name])
            size = folder_sizes(folder)["total"]
            row |= {"megabytes": round(size / 1e6, 1), "of_fp16": round(size / folder_sizes(base)["total"], 3)}
            rows.append(row | alone(use, folder, args.repeats))
            print(json.dumps(rows[-1]), flush=True)
    return Result("full-size-folders", {"rank": RANK, "repeats": args.repeats}, rows)
