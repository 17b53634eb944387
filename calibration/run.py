"""Makes new weights: quantizes a full-precision one-step model as a recipe says, and reports on what came out.

    python calibration/run.py                                        the small model to W4A4, on procedural pictures
    python calibration/run.py MODEL --bits w2a2 --data PHOTOS --steps 2000 --output runs/mine
    python calibration/run.py --resume --output runs/mine            after Ctrl-C, a crash or a full disk
    accelerate launch calibration/run.py MODEL ..                    on several GPUs, which share every batch

The run's folder gets `model/` (a complete pipeline folder, with `quantization.json` that records how it was made),
`report/index.html`, and `state.pt`, which `--resume` and `--start` read. Budgets are counted in steps; a resumed run ends bit for
bit as if it had never stopped, on the same machine with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its own folder must not shadow the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from calibration.trq import add_search_arguments
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import (
    BEFORE,
    check_no_overlap,
    hardware,
    overlap,
    photographs_record,
    recorded_files,
    versions,
    without_files,
)
from qartsr_pipeline.calibration.data.pairs import Patches
from qartsr_pipeline.calibration.data.patches import PhotographPatches
from qartsr_pipeline.calibration.data.photographs import list_photographs
from qartsr_pipeline.calibration.data.training_set import TrainingData
from qartsr_pipeline.calibration.evaluation.rows import markdown
from qartsr_pipeline.calibration.recipe import Recipe, check_quantizes, load_recipe, parse_bits, recipe_names, with_values
from qartsr_pipeline.calibration.report.model_card import model_card
from qartsr_pipeline.calibration.report.pipeline_folder import TRAINING_RECORD, save_pipeline
from qartsr_pipeline.calibration.report.run_report import FinishedRun, make_report
from qartsr_pipeline.calibration.retraining.settings import Settings, TimestepSearch
from qartsr_pipeline.calibration.saving import SavingError, write_whole
from qartsr_pipeline.calibration.start.warm_start import RECORD_NAME
from qartsr_pipeline.calibration.stopping import Stopped
from qartsr_pipeline.calibration.training.calibration_state import STATE_NAME
from qartsr_pipeline.calibration.training.engine import check_start, quantize
from qartsr_pipeline.calibration.training.losses import PERCEPTUAL, Perceptual, load_perceptual
from qartsr_pipeline.calibration.training.preparation import Told
from qartsr_pipeline.calibration.training.sharing import on_the_same_weights
from qartsr_pipeline.calibration.training.stages import Calibrated, Watch
from qartsr_pipeline.calibration.training.tensor_store import PREFIX
from qartsr_pipeline.calibration.training.workers import ALONE, Workers
from qartsr_pipeline.calibration.trq import TRQ
from qartsr_pipeline.checkpoint_files import fetch, shipped_checkpoints
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.cli.processes import join_processes
from qartsr_pipeline.cli.training_bar import TrainingBar
from qartsr_pipeline.quantization.freeze import freeze

ARGUMENTS_NAME = "run.json"
SAMPLE = Path(__file__).resolve().parents[1] / "qartsr_pipeline" / "samples" / "rider.jpg"
PLACE = ("output", "resume", "device")  # arguments that are not part of what is made
# What may be another one when a run is resumed: what the report alone is of, and what the state knows by its content.
MAY_CHANGE = (*PLACE, "evaluate", "model", "data", "start", "least_bypass_cost", "quality_margin")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="tiny-fp", help="full-precision checkpoint: folder, shipped name or Hub id")
    parser.add_argument(
        "--timestep",
        default="keep",
        help="QArtSR's first stage: a timestep to retrain the model at before quantizing it, `search` to find one"
        " (calibration/trq.py), or `keep` (default)",
    )
    add_search_arguments(parser.add_argument_group("with --timestep"))
    parser.add_argument("--recipe", default="qartsr", help=f"{', '.join(recipe_names())}, or a YAML file")
    parser.add_argument(
        "--bits", default="w4a4", type=str.lower, help="of weights and activations: 2, 3, 4, 6, 8, or 16 for none"
    )
    parser.add_argument("--steps", type=int, help="optimizer steps in all (default: the recipe's)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="anything else in the recipe: layer.branch_rank=4 stages.1.lr=0.003",
    )
    parser.add_argument(
        "--start",
        metavar="RUN",
        help="start from the parameters of that run, or of a quantized folder (also a shipped name or a Hub id) made of"
        " the same model, of the same or of other bits",
    )
    parser.add_argument("--data", help="folder of photographs to calibrate on (default: procedural pictures)")
    parser.add_argument("--degradation", choices=tuple(DEGRADATIONS), default="bicubic")
    parser.add_argument(
        "--perceptual", choices=PERCEPTUAL, default="encoder", help="features of the model's own encoder, or LPIPS"
    )
    parser.add_argument("--perceptual-weights", metavar="FILE", help="the backbone of LPIPS, torchvision's, as a local file")
    parser.add_argument("--evaluate", metavar="FOLDER", help="photographs for the report (default: the sample that comes along)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/calibration"), help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output, with its arguments")
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; those of the run itself where ``--resume`` continues it.

    Raises:
        ValueError, OSError: nothing to resume, other arguments than those of the run, or the folder holds another run.
    """
    parser = arguments()
    args = parser.parse_args(argv)
    path = args.output / ARGUMENTS_NAME
    if args.resume:
        try:
            parser.set_defaults(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"nothing to resume: {path} cannot be read ({error})") from error
        args, there = vars(parser.parse_args(argv)), vars(parser.parse_args(["--resume"]))
        for name in there.keys() - set(MAY_CHANGE):
            if args[name] != there[name]:
                raise ValueError(
                    f"--resume continues with the run's own arguments, and {name.replace('_', '-')} is {there[name]!r} there, not"
                    f" {args[name]!r}: leave it out, or choose another --output"
                )
        return argparse.Namespace(**args)
    if path.exists():
        raise ValueError(f"{args.output} holds a run already: continue it with --resume, or choose another --output")
    if args.output.exists() and any(args.output.iterdir()):
        raise FileExistsError(f"{args.output} exists and holds something else: choose another --output")
    return args


@dataclass
class Job:
    """What a run works on: checked arguments, loaded models and data.

    Attributes:
        before: name -> SHA-256 of the photographs that the models it is made from were made with.
        retrained: how the full-precision model was, before it was quantized; see `qartsr_pipeline.calibration.trq`.
    """

    args: argparse.Namespace
    recipe: Recipe
    bits: tuple[int, int]
    model: str
    source: Path
    start: Path | None
    pipeline: QArtSRPipeline
    full_precision: QArtSRPipeline
    patches: Patches
    data: dict[str, Any]
    evaluation: list[Path]
    before: dict[str, str]
    sweep: list[dict[str, Any]] | None = None
    retrained: dict[str, Any] | None = None


def at_timestep(args: argparse.Namespace) -> tuple[Path, list[dict[str, Any]] | None]:
    """The full-precision pipeline folder, retrained at another timestep if asked for, and the sweep's rows if there was one.

    Raises:
        ValueError: none fits the rule of the search. Stopped: call it again to go on.
    """
    if args.timestep == "keep":
        return fetch(args.model), None
    searched = args.timestep == "search"
    rule = (args.least_bypass_cost, args.quality_margin)
    timesteps = args.timesteps if searched else [int(args.timestep)]
    search = TimestepSearch.parse(timesteps, args.phases, args.full_phases, *rule, args.held_out)
    data = TrainingData(args.data, 0.0 if args.data else 1.0, args.degradation, args.held_out).load()
    settings = Settings(seed=args.seed, every=250, degradation=args.degradation)
    folder, device = args.output / "timestep", choose_device(args.device)[0]
    with TrainingBar() as bar:
        stage = TRQ(args.model, data, folder, search, settings, device=device, progress=bar)
        if not searched:
            return stage.retrain(args.model, int(args.timestep), search.full_phases, folder), None
        model = stage.run()
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return model, [row | {"chosen": row["timestep"] == sweep["chosen"]} for row in sweep["rows"]]


def load_job(args: argparse.Namespace, workers: Workers = ALONE) -> Job:
    """Checks everything that can be checked before the first step.

    Raises:
        ValueError, OSError, ImportError: bad arguments, recipe, model or data; pictures to evaluate among those to calibrate on.
    """
    changes = [] if args.steps is None else [f"steps={args.steps}"]
    recipe, bits = with_values(load_recipe(args.recipe), changes + args.set), parse_bits(args.bits)
    check_quantizes(bits)
    start = args.start and start_of(args.start)
    check_start(recipe, start)
    workers.check(recipe)
    if args.timestep != "keep" and start and start.is_file():
        raise ValueError("--start: the run is of the model as it is, and --timestep retrains it; give one of the two")
    if args.timestep not in ("keep", "search") and not (args.timestep.isdecimal() and int(args.timestep) < 1000):
        raise ValueError(f"--timestep {args.timestep}: expected keep, search, or a number from 0 to 999")
    if args.timestep != "keep" and workers.several:
        raise ValueError("--timestep: one process retrains the model; give what it wrote, OUTPUT/timestep/model, to several")
    evaluation = list_photographs(args.evaluate) if args.evaluate else [SAMPLE]
    patches, data = DeadLeaves(), {"procedural": "dead leaves"}
    if args.data:
        paths = list_photographs(args.data)
        patches, data = PhotographPatches(paths), photographs_record(paths)
        seen = overlap(evaluation, data["files"])
        if seen:
            raise ValueError(f"{seen[0]} is among the photographs to calibrate on: give other ones with --evaluate")
    device = workers.processes.device or choose_device(args.device)[0]
    source, before = fetch(args.model), {}
    for folder in (source, *([start.parent / "model" if start.is_file() else start] if start else [])):
        check_no_overlap(evaluation, folder)
        before |= recorded_files(folder) or {}
    if workers.is_main:
        start_folder(args)
    if args.timestep != "keep" and recipe.is_perceptual:  # what it lacks is said before the model is retrained, not after
        perceptual_of(args, QArtSRPipeline.from_pretrained(source))
    folder, sweep = at_timestep(args)
    retrained = None if args.timestep == "keep" else json.loads((folder / TRAINING_RECORD).read_text(encoding="utf-8"))
    without = {"text_encoder": None, "tokenizer": None}  # the fixed prompt is folded into the weights
    pipeline = QArtSRPipeline.from_pretrained(folder, **without).to(device)
    full_precision = on_the_same_weights(pipeline)
    for each in (pipeline, full_precision):
        each.set_progress_bar_config(disable=True)
    name = Path(args.model).name
    models = (name, source, start, pipeline, full_precision)
    return Job(args, recipe, bits, *models, patches, data, evaluation, before, sweep, retrained)


def perceptual_of(args: argparse.Namespace, full_precision: QArtSRPipeline) -> Perceptual:
    """The perceptual loss that the arguments ask for; raises what `load_perceptual` does."""
    weights = Path(args.perceptual_weights) if args.perceptual_weights else None
    return load_perceptual(args.perceptual, full_precision.vae, weights)


def start_folder(args: argparse.Namespace) -> None:
    """Makes the run's folder and writes its arguments into it, for `--resume`; removes what a killed process left there."""
    args.output.mkdir(parents=True, exist_ok=True)
    for left_over in args.output.glob(PREFIX + "*"):
        shutil.rmtree(left_over, ignore_errors=True)
    kept = {name: value for name, value in vars(args).items() if name not in PLACE}
    write_whole(args.output / ARGUMENTS_NAME, json.dumps(kept, indent=1, default=str).encode())


def forget_unbegun(output: Path) -> None:
    """Removes the arguments of a run that ended with an error before it made anything: the command can be corrected."""
    if output.is_dir() and [path.name for path in output.iterdir()] == [ARGUMENTS_NAME]:
        (output / ARGUMENTS_NAME).unlink()


def start_of(start: str) -> Path:
    """A run's state, or the quantized folder that this names."""
    state = Path(start) / STATE_NAME
    return state if state.exists() else fetch(start)


def record_of(job: Job, calibrated: Calibrated, perceptual: str | None) -> dict[str, Any]:
    """What `quantization.json` says."""
    return {
        "model": job.model,
        "timestep": job.pipeline.config.timestep,
        "retrained": job.retrained and {name: value for name, value in job.retrained.items() if name != "data"},
        "bits": job.args.bits,
        "recipe": job.recipe.to_dict(),
        "seed": job.args.seed,
        "start": calibrated.start,
        "degradation": job.args.degradation,
        "perceptual": perceptual,
        "data": job.data,
        BEFORE: job.before,
        "versions": versions(),
        "hardware": hardware(job.pipeline.vae.device.type),
        "loss": {stage: [float(f"{loss:.4g}") for loss in losses] for stage, losses in calibrated.losses.items()},
        "modules": calibrated.turns,
        "relative_error_of_each_layer_alone": {
            "before_training": {name: round(error, 6) for name, error in calibrated.errors_before.items()},
            "after_training": {name: round(error, 6) for name, error in calibrated.layer_errors.items()},
        },
    }


def run(
    args: argparse.Namespace,
    watch: Watch | None = None,
    preparing: Told | None = None,
    workers: Workers = ALONE,
) -> bool:
    """What the command does, once its arguments are parsed; False if it was stopped before the end.

    Args:
        workers: the processes that were launched together; the first one writes.
        watch, preparing: for programs that call this where no signal reaches it, or show how far it is: see
            `qartsr_pipeline.calibration.training.engine.begin`.
    """
    try:
        return _run(args, watch, preparing, workers)
    except (OSError, ValueError, ImportError):
        if workers.is_main and not args.resume:
            forget_unbegun(args.output)
        raise


def _run(args: argparse.Namespace, watch: Watch | None, preparing: Told | None, workers: Workers) -> bool:
    start = time.perf_counter()
    job = workers.together(lambda: load_job(args, workers))
    perceptual = perceptual_of(args, job.full_precision) if job.recipe.is_perceptual else None
    calibrated = quantize(
        job.pipeline,
        job.full_precision,
        job.recipe,
        job.bits,
        job.patches,
        args.seed,
        args.output / STATE_NAME,
        degradation=args.degradation,
        perceptual=perceptual,
        start=job.start,
        data=without_files(job.data),
        watch=watch,
        preparing=preparing,
        workers=workers,
    )
    if calibrated.stopped or not workers.is_main:
        return not calibrated.stopped
    record = record_of(job, calibrated, perceptual.name if perceptual else None)
    if job.recipe.layer.deployable:
        for name, scheme in calibrated.schemes.items():
            freeze(getattr(job.pipeline, name), scheme)
        on_disk = Path(args.model).expanduser().exists() or args.model in shipped_checkpoints()
        card = model_card(record, job.source, hub_id=None if on_disk else args.model)
        sizes = save_pipeline(job.pipeline, args.output / "model", RECORD_NAME, record, card)
        print(f"written: {args.output / 'model'}, {sizes['total'] / 1e6:.2f} MB")
    else:
        print(f"{job.recipe.method} is on a grid that exists in simulation only: no model is written, the report is")
    finished = FinishedRun(
        model_name=job.model,
        bits=args.bits,
        recipe=job.recipe,
        seed=args.seed,
        degradation=args.degradation,
        data=job.data,
        full_precision=job.full_precision,
        quantized=job.pipeline,
        evaluation=job.evaluation,
        calibrated=calibrated,
        record=record,
        seconds=time.perf_counter() - start,
        sweep=job.sweep,
    )
    report = make_report(finished, args.output / "report")
    print(markdown(report.rows))
    print(f"written: {report.page}")
    return True


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    workers = Workers(join_processes(parser.parse_args(argv).device))
    try:
        args = workers.of_first(lambda: parse(argv))
        finished = run(args, workers=workers)
        workers.processes.gather(finished)
    except Stopped:
        finished = False
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped at once; continue from what was saved last with --resume\n")
    except SavingError as error:
        parser.error(f"{' '.join(str(error).split())} Then continue with --resume.")
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))
    if not finished:
        how = f"python calibration/run.py --resume --output {args.output}"
        parser.exit(130, f"\nstopped and saved. Continue with: {how}\n" if workers.is_main else None)


if __name__ == "__main__":
    main()
