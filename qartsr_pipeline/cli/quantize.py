"""`qartsr quantize`: makes a quantized checkpoint from a full-precision one, and reports on it.

    qartsr quantize                                        the small model to W4A4, on procedural images
    qartsr quantize MODEL --bits w2a2 --data PHOTOS --steps 2000 --output runs/mine
    qartsr quantize --resume --output runs/mine            after Ctrl-C, a crash or a full disk
    accelerate launch calibration/run.py MODEL ..          on several GPUs, which share every batch; the same command

The run's folder gets `model/` (a complete pipeline folder, with `quantization.json` that records how it was made),
`report/index.html`, and `state.pt`, which `--resume` and `--start` read. Budgets are counted in steps; a resumed run ends bit for
bit as if it had never stopped, on the same machine with the same number of threads.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from qartsr_pipeline.calibration.arguments import (
    ARGUMENTS_NAME,
    AUTO,
    DTYPES,
    PERCEPTUAL_NAMES,
    VIDEO_RECIPE,
    Order,
    RunArguments,
    argument_text,
    default_recipe,
    read_arguments,
    recipe_names,
)
from qartsr_pipeline.calibration.data import DEGRADATION_NAMES
from qartsr_pipeline.calibration.retraining.settings import RETRAINING_LOSSES
from qartsr_pipeline.calibration.run_folder import check_free
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.checkpoint_files.checking import named_class, read_model_index
from qartsr_pipeline.cli.arguments import DEVICE_HELP, device_name
from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.cli.training_bar import TrainingBar
from qartsr_pipeline.whole_files import SavingError

if TYPE_CHECKING:
    from qartsr_pipeline.calibration.training.progress import Step
    from qartsr_pipeline.calibration.training.workers import Workers

OUTPUT = Path("runs/calibration")
UNITS = {"observe": "batch", "read clips": "frame"}  # of the parts of the preparation; the others count layers
DEFAULTS = RunArguments()


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser. Options that are not given are absent from what it returns: a resumed run has its own."""
    parser = subparsers.add_parser(
        "quantize",
        help="make a checkpoint of fewer bits from a full-precision one",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="What it does, and how to choose: docs/quantize-your-own-model.md",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("model", nargs="?", help=f"full-precision checkpoint: folder, shipped name or Hub id; default: {DEFAULTS.model}")
    add(
        "--recipe",
        help=f"{', '.join(recipe_names())}, or a YAML file; default: {DEFAULTS.recipe}, of a video model {VIDEO_RECIPE}",
    )
    add("--bits", type=str.lower, help=f"of weights and activations: 2, 3, 4, 6, 8, or 16 for none; default: {DEFAULTS.bits}")
    add("--steps", type=int, help="optimizer steps in all; default: the recipe's")
    add("--set", nargs="+", metavar="KEY=VALUE", help="anything else in the recipe: layer.branch_rank=4 stages.1.lr=0.003")
    add(
        "--start",
        metavar="RUN",
        help="start from the parameters of that run, or of a quantized checkpoint (also a shipped name or a Hub id) made of the"
        " same model, of the same or of other bits",
    )
    add(
        "--data",
        help="folder of photographs to calibrate on; of a video model, a video file, or a folder of clips: video files, or a"
        " folder of images each; default: procedural ones",
    )
    add("--degradation", choices=DEGRADATION_NAMES, help=f"of the images; default: {DEFAULTS.degradation}")
    add(
        "--perceptual",
        choices=(AUTO, *PERCEPTUAL_NAMES),
        help="features of the model's own encoder, or LPIPS (VGG16); auto: LPIPS where it is on this machine; default:"
        f" {DEFAULTS.perceptual}",
    )
    add("--perceptual-weights", metavar="FILE", help="the backbone of LPIPS, torchvision's: a local file, or a folder with it")
    add(
        "--dtype",
        choices=DTYPES,
        help="what frozen weights are held in while calibrating; 16 bits take half the memory, and everything is computed in"
        f" float32; default: {DEFAULTS.dtype}",
    )
    add(
        "--evaluate",
        metavar="FOLDER",
        help="photographs, or clips as for --data, for the report; default: the sample that comes along",
    )
    add("--seed", type=int, help=f"default: {DEFAULTS.seed}")
    add("--output", type=Path, default=OUTPUT, help=f"the run's folder; default: {OUTPUT}")
    add("--resume", action="store_true", default=False, help="continue the run in --output, with its arguments")
    add("--device", type=device_name, default="auto", metavar="DEVICE", help=DEVICE_HELP)
    add("--debug", action="store_true", default=False, help="show the traceback of an error")
    _add_timestep(parser)
    parser.set_defaults(run=run, keeps_freed_memory=False)


def _add_timestep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--timestep",
        help="QArtSR's first stage: a timestep to retrain the model at before quantizing it, `search` to find one, or `keep`;"
        f" default: {DEFAULTS.timestep}",
    )
    group = parser.add_argument_group("with --timestep")
    phases: dict[str, Any] = {"nargs": "+", "metavar": "NAME:STEPS:LR:PATCH:BATCH"}
    candidates = " ".join(map(str, DEFAULTS.timesteps))
    group.add_argument("--timesteps", type=int, nargs="+", metavar="T", help=f"candidates; default: {candidates}")
    group.add_argument("--phases", help=f"at each candidate; default: {' '.join(DEFAULTS.phases)}", **phases)
    group.add_argument("--full-phases", help=f"at the chosen one; default: {' '.join(DEFAULTS.full_phases)}", **phases)
    group.add_argument(
        "--least-bypass-cost",
        type=float,
        metavar="DB",
        help=f"what leaving the UNet out must cost at a timestep that may be chosen; default: {DEFAULTS.least_bypass_cost:g}",
    )
    group.add_argument(
        "--quality-margin",
        type=float,
        metavar="DB",
        help=f"this much below the best full-precision quality is as good; default: {DEFAULTS.quality_margin:g}",
    )
    group.add_argument("--held-out", type=int, metavar="N", help=f"images kept for measuring; default: {DEFAULTS.held_out}")
    group.add_argument(
        "--search-bits",
        type=str.lower,
        help=f"of the plain quantization that candidates are measured with; default: {DEFAULTS.search_bits}",
    )
    group.add_argument(
        "--retraining-loss",
        choices=RETRAINING_LOSSES,
        help=f"between images; the paper's is l2+lpips; default: {DEFAULTS.retraining_loss}",
    )


def arguments_of(given: dict[str, Any], output: Path, resume: bool) -> RunArguments:
    """The run's arguments: those given, on top of the defaults, or of the run that is resumed.

    Raises:
        ValueError, OSError: nothing to resume, other arguments than those of the run, the run was made of what a Python program
            had in memory, or the folder holds another run.
    """
    there = read_arguments(output)
    if resume:
        if there is None:
            raise UsageError(f"nothing to resume: there is no {output / ARGUMENTS_NAME}. Begin the run without --resume")
        in_memory = there.only_in_memory() + (["the images to measure on"] if there.evaluate_in_memory else [])
        if in_memory and (there.only_in_memory() or "evaluate" not in given):
            way_out = "" if there.only_in_memory() else ", or name a folder with --evaluate"
            raise UsageError(
                f"the run in {output} was begun in Python with {' and '.join(in_memory)} in memory, which no folder has: continue"
                f" it there, by calling quantize() with the same arguments{way_out}"
            )
        arguments = replace(there, evaluate_in_memory=False, **given)
        for name in there.differing(arguments):
            raise UsageError(
                f"--resume continues with the run's own arguments, and {argument_text(name)} is {getattr(there, name)!r} there,"
                f" not {getattr(arguments, name)!r}: leave it out, or choose another --output"
            )
        return arguments
    if there is not None:
        raise UsageError(f"{output} holds a run already: continue it with --resume, or choose another --output")
    check_free(output)
    if "recipe" not in given:
        folder = fetch(given.get("model", DEFAULTS.model))
        given = given | {"recipe": default_recipe(named_class(read_model_index(folder)) or "")}
    return RunArguments.of(given)


def run(options: argparse.Namespace) -> int:
    """Carries out the run and prints what was made; 130 if it was stopped."""
    from qartsr_pipeline.calibration.training.workers import Workers
    from qartsr_pipeline.cli.device import choose_device
    from qartsr_pipeline.cli.processes import join_processes

    processes = join_processes(options.device)
    workers = Workers(processes.index, processes.count, processes.device)
    given = {part.name: getattr(options, part.name) for part in fields(RunArguments) if part.name in options}
    arguments = workers.of_first(lambda: arguments_of(given, options.output, options.resume))
    order = Order(arguments, options.output, device=choose_device(options.device, processes.device)[0], continues=options.resume)
    how = f"qartsr quantize --resume --output {options.output}"
    try:
        finished = _run(order, workers)
        processes.gather(finished)
    except SavingError as error:
        begun = (options.output / ARGUMENTS_NAME).is_file()
        raise SavingError(f"{error} Then continue with: {how}" if begun else str(error)) from error
    except ImportError as error:  # of an optional package; the message says how to install it
        raise UsageError(str(error)) from error
    except KeyboardInterrupt:
        print(f"\nstopped at once; continue from what was saved last with: {how}", file=sys.stderr)
        return 130
    if not finished and workers.is_main:
        print(f"\nstopped and saved. Continue with: {how}", file=sys.stderr)
    return 0 if finished else 130


def _run(order: Order, workers: Workers) -> bool:
    from qartsr_pipeline.calibration.carry_out import MODEL, carry_out
    from qartsr_pipeline.calibration.evaluation.rows import markdown
    from qartsr_pipeline.calibration.report.pipeline_folder import folder_sizes

    with Bars(shown=workers.is_main) as bars:
        result = carry_out(order, bars, workers)
    if not result.finished or not workers.is_main:
        return result.finished
    if result.pipeline is not None:
        size = folder_sizes(order.output / MODEL)["total"]
        print(f"written: {order.output / MODEL}, {size / 1e6:.2f} MB")
    else:
        method = result.record["recipe"]["method"]
        print(f"{method} is on a grid that exists in simulation only: no model is written, the report is")
    if result.record["perceptual"]:
        why = f" (not LPIPS: {result.record['no_lpips']})" if "no_lpips" in result.record else ""
        print(f"perceptual loss: {result.record['perceptual']}{why}")
    print(markdown(result.rows))
    print(f"written: {result.report}")
    return True


class Bars(TrainingBar):
    """Progress as bars: one for each part of the preparation, then one over the steps. Nothing where it is not `shown`."""

    def __init__(self, shown: bool) -> None:
        super().__init__()
        self._shown = shown
        self._part: tuple[str, tqdm] | None = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_part()
        super().__exit__(kind, error, trace)

    def _close_part(self) -> None:
        if self._part is not None:
            self._part[1].close()
        self._part = None

    def preparing(self, what: str, done: int, total: int) -> None:
        """Moves the part's bar; the next part gets a new one in its place."""
        if not self._shown:
            return
        if self._part is None or self._part[0] != what:
            self._close_part()
            self._part = what, tqdm(total=total, desc=what, unit=UNITS.get(what, "layer"), leave=False)
        bar = self._part[1]
        bar.update(done - bar.n)

    def stepped(self, step: Step) -> bool:
        self._close_part()
        return self._shown and super().stepped(step)
