"""Calibration at the size of Stable Diffusion 2.1: seconds of each stage, seconds a step, and peak memory.

    python -m benchmarks run full-size --steps 6 --output FILE.json

The weights are random, so the images are noise: only seconds and bytes mean something. It runs what `calibration/run.py` runs,
on procedural images, with few steps; what a full run takes is extrapolated from the measured steps, and labelled as such.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from benchmarks.contenders import full_precision as random_network
from benchmarks.result import Result, alone, markdown, peak_megabytes
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.arguments import DTYPES
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.instances import hold_in, on_the_same_weights
from qartsr_pipeline.calibration.recipe import parse_bits
from qartsr_pipeline.calibration.recipe_files import load_recipe, with_values
from qartsr_pipeline.calibration.report.pipeline_folder import save_pipeline
from qartsr_pipeline.calibration.start.warm_start import RECORD_NAME
from qartsr_pipeline.calibration.training import engine
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext, StateFile
from qartsr_pipeline.calibration.training.engine import begin
from qartsr_pipeline.calibration.training.losses import load_perceptual
from qartsr_pipeline.calibration.training.progress import Calibrated, Callbacks
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.convert import stable_diffusion_2_1
from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.quantization.freeze import freeze

INITIALISATION = ("observe_full_precision", "give_ranks", "give_bits", "initialise")  # functions that `begin` calls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", default="qartsr")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--steps", type=int, default=6, help="that are run (default: 6)")
    parser.add_argument("--full-steps", type=int, default=1000, help="that are extrapolated to (default: 1000)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of frozen weights (default: float16, as stored)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="as calibration/run.py")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--folder", type=Path, help="where 4 GB are free (default: a temporary folder)")


def write_random_model(folder: Path) -> None:
    """A pipeline folder with the shapes of Stable Diffusion 2.1-base and OSEDiff's timestep, float16 on disk."""
    network = random_network("sd21")
    prompt, scheduler = PromptEmbedding.from_tensor(network.prompt_embeds), DDPMScheduler(**stable_diffusion_2_1.SCHEDULER)
    pipeline = QArtSRPipeline(network.unet.half(), network.vae.half(), scheduler, prompt, timestep=network.timestep, scale=4)
    pipeline.save_pretrained(folder)


def peak_gigabytes(device: str) -> float:
    """Of the GPU, or of the process since it began."""
    return peak_megabytes(device) / 1e3


@contextmanager
def timed(stages: dict[str, dict[str, float]], name: str, device: str) -> Iterator[None]:
    """Adds the seconds of what is done within, those of the processor among them, and the peak of memory after it."""
    start, begun = time.perf_counter(), time.process_time()
    yield
    stages[name] = {
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(time.process_time() - begun, 2),
        "peak_gigabytes_so_far": round(peak_gigabytes(device), 2),
    }
    print(f"{name}: {stages[name]}", flush=True)


def time_the_initialisation(stages: dict[str, dict[str, float]], device: str) -> None:
    """Makes `begin` tell what each of its parts takes."""
    for name in INITIALISATION:
        function = getattr(engine, name)

        def run(*arguments: Any, name: str = name, function: Any = function) -> Any:
            with timed(stages, name, device):
                return function(*arguments)

        setattr(engine, name, run)


def measure(args: argparse.Namespace) -> Result:
    """One calibration of a model with random weights: a row for each stage."""
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        alone(write_random_model, Path(folder))  # whose memory is not calibration's
        return calibrate(Path(folder), args)


def calibrate(folder: Path, args: argparse.Namespace) -> Result:
    """One calibration of the model in ``folder``, timed."""
    device, _ = choose_device(args.device)
    recipe = with_values(load_recipe(args.recipe), [f"steps={args.steps}", *args.set])
    stages: dict[str, dict[str, float]] = {}
    with timed(stages, "load", device):
        pipeline = QArtSRPipeline.from_pretrained(folder).to(device)
        pipeline.set_progress_bar_config(disable=True)
        hold_in(pipeline, args.dtype)
        full_precision = on_the_same_weights(pipeline)
    time_the_initialisation(stages, device)
    ends: list[float] = []
    processor_ends: list[float] = []
    perceptual = load_perceptual("encoder", full_precision.vae) if recipe.is_perceptual else None
    with timed(stages, "begin", device):
        context = CalibrationContext(
            pipeline,
            full_precision,
            recipe,
            parse_bits(args.bits),
            DeadLeaves(),
            perceptual=perceptual,
            progress=Callbacks(on_step=lambda *_: note_time(ends, processor_ends), on_preparation=said),
        )
        run = begin(context, StateFile(folder / "state.pt"))
    note_time(ends, processor_ends)
    with timed(stages, "train", device):
        calibrated = run.complete()
    with timed(stages, "freeze and save", device):
        for name, scheme in calibrated.schemes.items():
            freeze(getattr(pipeline, name), scheme)
        sizes = save_pipeline(pipeline, folder / "model", RECORD_NAME, {"model": "random weights"})
    seconds, processor = seconds_of_steps(calibrated, ends), seconds_of_steps(calibrated, processor_ends)
    summary = {
        "parameters": {name: sum(p.numel() for p in getattr(full_precision, name).parameters()) for name in ("unet", "vae")},
        "seconds_of_steps": seconds,
        "processor_seconds_of_steps": processor,
        "peak_gigabytes": round(peak_gigabytes(device), 2),
        "stored_megabytes": round(sizes["total"] / 1e6, 1),
        "extrapolated_hours": extrapolated(args, stages, seconds),
    }
    rows = [{"stage": name, **found} for name, found in stages.items()]
    return Result("full-size", {"recipe": recipe.to_dict(), "bits": args.bits, "dtype": args.dtype}, rows, summary)


def note_time(ends: list[float], processor_ends: list[float]) -> None:
    ends.append(time.perf_counter())
    processor_ends.append(time.process_time())


def said(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", end="\r", file=sys.stderr, flush=True)


def seconds_of_steps(calibrated: Calibrated, ends: list[float]) -> dict[str, list[float]]:
    """Stage -> seconds of each of its steps, from the times at which they ended."""
    seconds, first = {}, 0
    for stage, losses in calibrated.losses.items():
        marks = ends[first : first + len(losses) + 1]
        seconds[stage] = [round(later - earlier, 2) for earlier, later in pairwise(marks)]
        first += len(losses)
    return seconds


def extrapolated(
    args: argparse.Namespace, stages: dict[str, dict[str, float]], seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """What as many steps as ``--full-steps`` would take, at each stage's median of the measured ones; not measured. What a stage
    does once (recording its batches) is in its first step.
    """
    recipe = with_values(load_recipe(args.recipe), [*args.set, f"steps={args.full_steps}"])
    once = sum(stages[name]["seconds"] for name in ("load", "begin", "freeze and save"))
    training = sum(
        sum(recipe.steps_of(stage, 1)) * statistics.median(seconds[stage.name])
        for stage in recipe.stages
        if seconds.get(stage.name)
    )
    return {"steps": args.full_steps, "hours": round((once + training) / 3600, 2)}


def table(result: Result) -> str:
    """Markdown: the stages, and what was measured of all of them."""
    keys = ("stage", "seconds", "processor_seconds", "peak_gigabytes_so_far")  # earlier results lack one
    rows = [[str(row.get(key, "")) for key in keys] for row in result.rows]
    lines = [f"{name}: {value}" for name, value in result.summary.items()]
    return "\n".join([markdown(["stage", "seconds", "of the processor", "peak so far, GB"], rows), "", *lines])
