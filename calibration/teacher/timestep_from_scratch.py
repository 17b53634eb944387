"""TRQ's choice of the timestep for a model that is not there yet: all candidates begin at the same autoencoder.

    python -m calibration.teacher.train --data PHOTOS --output runs/autoencoder --phases autoencoder:4000:1e-3:64:8
    python -m calibration.teacher.timestep_from_scratch runs/autoencoder --output runs/sweep --timesteps 20 100 250 500

`qartsr_pipeline.calibration.trq` moves a trained model to every candidate, which favours the timestep that it was trained at.
Here each candidate is a UNet with fresh weights, the same ones, trained for the same few steps on the same patches. Measure and
rule are TRQ's; --least-bypass-cost is lower than usual, because so few steps do not restore 1 dB yet.

OUTPUT holds a training folder for each candidate (``t100`` and so on), which the trainer's --resume --timestep T --phases ..
continues, and ``sweep.json``, ``sweep.md`` and ``sweep.png``. Finished candidates are kept: call it again to continue.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from calibration.teacher import train as teacher
from calibration.teacher.train import TeacherRun
from qartsr_pipeline.calibration.retraining.settings import Rule, TimestepSearch, parse_phase
from qartsr_pipeline.calibration.retraining.trainer import STATE_NAME, load_state
from qartsr_pipeline.calibration.training.progress import Stopped
from qartsr_pipeline.calibration.trq import RESULT_NAME, TRQ, Candidate, choose
from qartsr_pipeline.cli.training_bar import TrainingBar
from qartsr_pipeline.whole_files import write_whole

PHASES = ("latent:300:1e-3:64:8", "pixel:100:5e-4:64:8")


def finished_autoencoder(folder: Path) -> TeacherRun:
    """The run that trained it; raises ValueError or OSError where there is none."""
    state = load_state(folder / STATE_NAME)
    names = [phase["name"] for phase in state["phases"]]
    if names != ["autoencoder"] or state["phase_index"] != 1:
        raise ValueError(
            f"{folder} holds the phases {', '.join(names)}, {state['phase_index']} of them finished: the candidates begin at a"
            " finished autoencoder, trained with --phases autoencoder:.."
        )
    return teacher.parse(["--resume", "--output", str(folder)])


def candidate(autoencoder: TeacherRun, timestep: int, stage: TRQ) -> Candidate:
    """Trains and measures one; raises Stopped when asked to stop, and ValueError where its folder is of other settings."""
    folder = stage.output / f"t{timestep:03d}"
    path, phases = folder / RESULT_NAME, stage.search.phases
    made_with = {"phases": [asdict(phase) for phase in phases], "timestep": timestep, "bits": list(stage.search.bits)}
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["made_with"] != made_with:
            raise ValueError(f"{path} was made with other settings: choose another --output, or remove {folder}")
        return Candidate(**result["candidate"])
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / STATE_NAME).exists():
        shutil.copyfile(autoencoder.state_path, folder / STATE_NAME)
    run = replace(autoencoder, output=folder, phases=[*autoencoder.phases, *phases], timestep=timestep)
    trainer = run.trainer(stage.progress)
    if not trainer.run():
        raise Stopped(f"stopped at {trainer.place} of timestep {timestep}; call it again to continue")
    found = stage.measure(trainer.model)
    write_whole(path, (json.dumps({"candidate": asdict(found), "made_with": made_with}, indent=1) + "\n").encode())
    return found


def sweep(autoencoder: TeacherRun, stage: TRQ) -> Candidate:
    """Every candidate; returns the chosen one, and writes the table whether there is one or not.

    Raises:
        ValueError: none passes the rule; see also `candidate`. Stopped: call it again to continue.
    """
    found = [candidate(autoencoder, timestep, stage) for timestep in stage.search.timesteps]
    stage.write(found, None)  # the measurements are there also when the rule refuses them all
    chosen = choose(found, stage.search.rule)
    stage.write(found, chosen)
    return chosen


def main(argv: list[str] | None = None) -> None:
    description = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="calibration.teacher.timestep_from_scratch", description=description)
    parser.add_argument("autoencoder", type=Path, help="training folder with the finished autoencoder")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--timesteps", type=int, nargs="+", default=[20, 100, 250, 500], metavar="T")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), metavar="NAME:STEPS:LR:PATCH:BATCH")
    parser.add_argument("--least-bypass-cost", type=float, default=0.3, metavar="DB", help="(default: %(default)s)")
    parser.add_argument("--quality-margin", type=float, default=Rule.quality_margin, metavar="DB", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    with TrainingBar() as bar:
        try:
            rule = Rule(args.least_bypass_cost, args.quality_margin)
            search = TimestepSearch(tuple(args.timesteps), tuple(map(parse_phase, args.phases)), rule=rule)
            run = finished_autoencoder(args.autoencoder)
            sweep(
                run,
                TRQ(str(args.autoencoder), run.data.load(), args.output, search, run.settings, device=run.device, progress=bar),
            )
        except Stopped as stopped:
            parser.exit(130, f"\n{stopped}\n")
        except (OSError, ValueError, FloatingPointError) as error:
            parser.error(" ".join(str(error).split()))
    print((args.output / "sweep.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
