"""Trains the small full-precision model, in OSEDiff's structure and with stock diffusers classes.

    python calibration/teacher/train.py --data PHOTOS --output runs/teacher
    python calibration/teacher/train.py --procedural 1 --output runs/teacher          without any photograph
    python calibration/teacher/train.py --resume --output runs/teacher                after Ctrl-C, or with more --phases
    python calibration/teacher/train.py --start MODEL --timestep 999 --data PHOTOS    an existing model, moved to another timestep

Four phases, each with its own steps and learning rate (`training_settings.Phase`):

1. ``autoencoder``: the VAE learns to reproduce high-resolution patches (and their bicubic versions, so that it is an identity
   for whatever the UNet has to express). Afterwards ``scaling_factor`` makes its latents unit variance.
2. ``latent``: VAE frozen. The UNet learns, at the one timestep T, the step from the latent of the bicubic input to the latent
   of the photograph. No pixel is decoded, so this is cheap.
3. ``pixel``: decoder still frozen, the loss is on the decoded picture. Encoder frozen too, unless ``--train-encoder``.
4. ``joint`` (optional): everything trains, with the autoencoder's loss kept beside the picture's.

The decoder never learns to restore before phase 4, so that the UNet does the work: what bypassing it costs is printed with every
validation. Everything is a function of the seed and of the step number: a stopped run continues as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: its own folder must not shadow the packages beside it
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import versions
from qartsr_pipeline.calibration.data.overlap import photographs_record
from qartsr_pipeline.calibration.data.pairs import MixedPatches, Pair, Patches, choose_held_out, held_out_pairs, procedural_pairs
from qartsr_pipeline.calibration.data.photographs import PhotographPatches, list_photographs
from qartsr_pipeline.calibration.retraining.losses import DISTANCES
from qartsr_pipeline.calibration.retraining.one_step_model import TIMESTEP, Teacher, build_models
from qartsr_pipeline.calibration.retraining.settings import Phase, Settings, parse_phase
from qartsr_pipeline.calibration.retraining.start import latents_for_fit, move_timestep, teacher_from_folder
from qartsr_pipeline.calibration.retraining.trainer import Trainer
from qartsr_pipeline.calibration.training.training_state import STATE_NAME, load_state

__all__ = ["Phase", "Settings", "Teacher", "Trainer", "build_models", "main"]

DEFAULT_PHASES = ("autoencoder:4000:1e-3:96:8", "latent:4000:1e-3:128:8", "pixel:20000:5e-4:128:8")
PHASES_HELP = f"default: {' '.join(DEFAULT_PHASES)}; with --start without the first"
PLACE = ("output", "device", "resume", "phases")  # arguments that are not part of what is trained


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of photographs; optional with --procedural 1")
    parser.add_argument("--procedural", type=float, default=0.0, metavar="SHARE", help="share of dead-leaves pictures, 0 to 1")
    parser.add_argument("--degradation", choices=tuple(DEGRADATIONS), default="bicubic")
    parser.add_argument("--output", type=Path, default=Path("runs/teacher"))
    parser.add_argument("--start", metavar="MODEL", help="full-precision pipeline folder to begin at, instead of fresh weights")
    parser.add_argument("--timestep", type=int, help=f"T (default: {TIMESTEP}, or that of --start)")
    parser.add_argument("--phases", nargs="+", metavar="NAME:STEPS:LR:PATCH:BATCH", help=PHASES_HELP)
    parser.add_argument("--train-encoder", action="store_true", help="train the VAE encoder in the pixel phase, as OSEDiff does")
    parser.add_argument("--loss", choices=tuple(DISTANCES), default="l1", help="distance of latents and pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--every", type=int, default=500, help="validate and save every so many steps")
    parser.add_argument("--held-out", type=int, default=8, help="pictures kept for validation")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --output, with its arguments unless given anew"
    )
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, those of the run itself where ``--resume`` continues it; raises ValueError where they cannot be meant."""
    parser = arguments()
    args = parser.parse_args(argv)
    path = args.output / STATE_NAME
    if args.resume:
        state = load_state(path)
        parser.set_defaults(**(state.get("record") or {}).get("arguments", {}))
        recorded = [":".join(str(phase[part.name]) for part in fields(Phase)) for phase in state["phases"]]
        parser.set_defaults(phases=recorded)
        args = parser.parse_args(argv)
    elif path.exists():
        raise ValueError(f"{path} is there already: continue that run with --resume, or choose another --output")
    args.phases = [parse_phase(text) for text in args.phases or DEFAULT_PHASES[1 if args.start else 0 :]]
    if args.timestep is None and args.start is None:
        args.timestep = TIMESTEP
    if not 0 <= args.procedural <= 1:
        raise ValueError(f"--procedural {args.procedural:g}: the share of procedural pictures is a number from 0 to 1")
    if args.data is None and args.procedural < 1:
        raise ValueError("nothing to train on: give a folder of photographs with --data, or --procedural 1 to do without")
    if args.every < 1 or args.held_out < 1 or not 0 <= args.ema < 1 or not 0 <= (args.timestep or 0) < 1000:
        raise ValueError("--every and --held-out must be above 0, --ema at least 0 and below 1, --timestep from 0 to 999")
    return args


def pictures(args: argparse.Namespace) -> tuple[Patches, list[Pair], dict[str, Any]]:
    """Patches to train on, pairs to validate on, and what the record says about the data."""
    if args.data is None:
        patches = DeadLeaves()
        return patches, procedural_pairs(patches, args.held_out, args.degradation), {"data": None, "held_out": []}
    paths = list_photographs(args.data)
    held = choose_held_out(paths, args.held_out)
    rest = [path for path in paths if path not in held]
    if not rest and args.procedural < 1:
        raise ValueError(f"all {len(paths)} photographs are kept for validation: give more of them, or lower --held-out")
    patches: Patches = DeadLeaves() if args.procedural == 1 else PhotographPatches(rest)
    if 0 < args.procedural < 1:
        patches = MixedPatches(patches, DeadLeaves(), args.procedural)
    record = {"data": photographs_record(paths), "held_out": [path.name for path in held]}
    return patches, held_out_pairs(held, args.degradation), record


def build_model(args: argparse.Namespace, patches: Patches) -> Teacher:
    """Fresh weights, or those of ``--start``, moved to ``--timestep``."""
    if args.start is None:
        return Teacher(args.seed, args.timestep)
    model = teacher_from_folder(args.start)
    if args.timestep is not None:
        move_timestep(model, args.timestep, latents_for_fit(model, patches, args.degradation))
    return model


def build_trainer(args: argparse.Namespace) -> Trainer:
    """The run that the arguments describe, at its beginning or, with ``--resume``, where it was left."""
    patches, held_out, record = pictures(args)
    model = build_model(args, patches)
    args.timestep = model.timestep
    args.output.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in vars(args).items() if name not in PLACE}
    record |= {"seed": args.seed, "timestep": args.timestep, "arguments": kept, "versions": versions()}
    model = model.to(device=args.device, memory_format=torch.channels_last)
    settings = Settings(**{part.name: getattr(args, part.name) for part in fields(Settings)})
    trainer = Trainer(model, args.phases, patches, held_out, settings, record)
    if args.resume:
        before = (load_state(trainer.state_path).get("record") or {}).get("data", record["data"])
        if (before or {}).get("sha256") != (record["data"] or {}).get("sha256"):
            raise ValueError(
                f"the photographs are not those that {trainer.state_path} was trained on: restore them or start anew"
            )
        trainer.resume()
    return trainer


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    try:
        args = parse(argv)
        trainer = build_trainer(args)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    how = f"python calibration/teacher/train.py --resume --output {args.output}"
    try:
        finished = trainer.run()
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped at once; {trainer.state_path} holds what was saved last. Continue with: {how}\n")
    except (OSError, ValueError, FloatingPointError) as error:
        parser.exit(1, f"\nteacher.py: error: {error}\n")
    if not finished:
        parser.exit(130, f"\nstopped; saved at {trainer.place} in {trainer.state_path}. Continue with: {how}\n")
    print(
        f"finished: {trainer.state_path}; write the model with: python calibration/teacher/export.py {trainer.state_path} FOLDER"
    )


if __name__ == "__main__":
    main()
