"""Trains the small full-precision model, in OSEDiff's structure and with stock diffusers classes.

    python -m calibration.teacher.train --data PHOTOS --output runs/teacher
    python -m calibration.teacher.train --procedural 1 --output runs/teacher          without any photograph
    python -m calibration.teacher.train --resume --output runs/teacher                after Ctrl-C, or with more --phases
    python -m calibration.teacher.train --start MODEL --timestep 999 --data PHOTOS    an existing model, at another timestep

Five phases, each with its own steps and learning rate (`retraining.settings.Phase`):

1. ``autoencoder``: the VAE learns to reproduce high-resolution patches (and their bicubic versions, so that it is an identity
   for whatever the UNet has to express). Afterwards ``scaling_factor`` makes its latents unit variance.
2. ``latent``: VAE frozen. The UNet learns, at the one timestep T, the step from the latent of the bicubic input to the latent
   of the photograph. No pixel is decoded, so this is cheap.
3. ``pixel``: decoder still frozen, the loss is on the decoded image. Encoder frozen too, unless ``--train-encoder``.
4. ``joint`` (optional): everything trains, with the autoencoder's loss kept beside the image's.
5. ``photo`` (optional): everything trains for what people prefer: L1, LPIPS (VGG), DISTS and a discriminator's verdict, each with
   its weight, on photographs and on pairs with another upscaler's outputs. Made for an existing model and bad images:

    python -m calibration.teacher.make_pairs PHOTOS PAIRS --net WEIGHTS/realesrgan-x4plus
    python -m calibration.teacher.train --start MODEL --data PHOTOS --output runs/photo --phases photo:3000:5e-4:96:4
        --degradation photo --backbone vgg16_features.safetensors --distilled PAIRS --adversarial 0.02

The decoder never learns to restore before phase 4, so that the UNet does the work: what bypassing it costs is printed with every
validation. Everything is a function of the seed and of the step number: a stopped run continues as if it had not been stopped.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from calibration.teacher.command import run_training
from calibration.teacher.model import TIMESTEP, new_model
from calibration.teacher.perceptual.distilled_pairs import DistilledPairs
from calibration.teacher.perceptual.settings import PHOTO, PhotoSettings, add_photo_arguments
from calibration.teacher.perceptual.trainer import PhotoTrainer
from qartsr_pipeline.calibration.data import DEGRADATION_NAMES
from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.fingerprint import versions
from qartsr_pipeline.calibration.data.pairs import Pair, TrainingData, choose_held_out, held_out_pairs, procedural_pairs
from qartsr_pipeline.calibration.data.patches import Patches, list_photographs
from qartsr_pipeline.calibration.retraining.move_timestep import latents_for_fit, move_timestep
from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel
from qartsr_pipeline.calibration.retraining.settings import DISTANCE_NAMES, PHASES, Phase, Settings, parse_phase, phase_text
from qartsr_pipeline.calibration.retraining.trainer import STATE_NAME, Trainer, load_state
from qartsr_pipeline.calibration.training.progress import SILENT, Progress

DEFAULT_PHASES = ("autoencoder:4000:1e-3:96:8", "latent:4000:1e-3:128:8", "pixel:20000:5e-4:128:8")
PHASES_HELP = f"default: {' '.join(DEFAULT_PHASES)}; with --start without the first"


@dataclass(frozen=True)
class TeacherRun:
    """A training run.

    Attributes:
        start: full-precision model to begin at; None for fresh weights.
        timestep: T; None for that of ``start``.
        resume: continue from the state in ``output``.
        photo: of the phase "photo"; None where there is none.
    """

    data: TrainingData
    phases: list[Phase]
    settings: Settings
    output: Path
    start: str | None
    timestep: int | None
    device: str = "cpu"
    resume: bool = False
    photo: PhotoSettings | None = None

    @property
    def state_path(self) -> Path:
        return self.output / STATE_NAME

    def arguments(self, timestep: int) -> dict[str, Any]:
        """What the state records, under the names of the command's arguments: `--resume` takes them from there."""
        data = {name: getattr(self.data, name) for name in ("data", "procedural", "degradation", "held_out")}
        settings = {name: getattr(self.settings, name) for name in ("train_encoder", "loss", "seed", "ema", "every", "bf16")}
        return {**data, "start": self.start, "timestep": timestep, **settings, **(asdict(self.photo) if self.photo else {})}

    def model(self, patches: Patches) -> OneStepModel:
        """Fresh weights, or those of ``start``, moved to ``timestep``.

        Raises:
            ValueError, OSError: ``start`` is quantized or unavailable.
        """
        if self.start is None:
            return new_model(self.settings.seed, TIMESTEP if self.timestep is None else self.timestep)
        model = OneStepModel.from_pretrained(self.start)
        if self.timestep is not None:
            move_timestep(model, self.timestep, latents_for_fit(model, patches, self.data.degradation))
        return model

    def trainer(self, progress: Progress = SILENT) -> Trainer:
        """The run at its beginning or, with ``resume``, where it was left.

        Raises:
            ValueError, OSError: bad data or model, or a state that does not fit them.
            ImportError: the package with the weights of LPIPS or DISTS is not installed.
        """
        images = (replace(self.data, degradation="bicubic") if self.photo else self.data).load()
        model = self.model(images.patches)
        self.output.mkdir(parents=True, exist_ok=True)
        own = {"seed": self.settings.seed, "timestep": model.timestep, "arguments": self.arguments(model.timestep)}
        record = {**images.record, **own, "versions": versions()}
        model = model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = (model, self.phases, images, self.settings, self.output, record)
        if self.photo is None:
            trainer = Trainer(*run, progress=progress)
        else:
            distilled = DistilledPairs(self.photo.distilled) if self.photo.distilled else None
            real = self._really_degraded()
            trainer = PhotoTrainer(*run, progress=progress, photo=self.photo, real=real, distilled=distilled)
        if self.resume:
            before = (load_state(self.state_path).get("record") or {}).get("data", record["data"])
            if (before or {}).get("sha256") != (record["data"] or {}).get("sha256"):
                raise ValueError(
                    f"the photographs are not those that {self.state_path} was trained on: restore them or start anew"
                )
            trainer.resume()
        return trainer

    def _really_degraded(self) -> list[Pair]:
        """The held-out images in the degradation "real"."""
        if self.data.data is None:
            return procedural_pairs(DeadLeaves(), self.data.held_out, "real")
        assert isinstance(self.data.data, str)  # the command takes a folder
        return held_out_pairs(choose_held_out(list_photographs(self.data.data), self.data.held_out), "real")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calibration.teacher.train", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", help="folder of photographs; optional with --procedural 1")
    parser.add_argument("--procedural", type=float, default=0.0, metavar="SHARE", help="share of dead-leaves images, 0 to 1")
    parser.add_argument("--degradation", choices=DEGRADATION_NAMES, default="bicubic")
    parser.add_argument("--output", type=Path, default=Path("runs/teacher"))
    parser.add_argument("--start", metavar="MODEL", help="full-precision pipeline folder to begin at, instead of fresh weights")
    parser.add_argument("--timestep", type=int, help=f"T (default: {TIMESTEP}, or that of --start)")
    parser.add_argument("--phases", nargs="+", metavar="NAME:STEPS:LR:PATCH:BATCH", help=PHASES_HELP)
    parser.add_argument("--train-encoder", action="store_true", help="train the VAE encoder in the pixel phase, as OSEDiff does")
    parser.add_argument("--loss", choices=DISTANCE_NAMES, default="l1", help="distance of latents and images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the moving average of the weights")
    parser.add_argument("--every", type=int, default=500, metavar="N", help="steps between validations, each of which is saved")
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="images kept for validation")
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --output, with its arguments unless given anew"
    )
    add_photo_arguments(parser)
    return parser


def parse(argv: list[str] | None) -> TeacherRun:
    """The run that the arguments describe; with ``--resume`` they default to those of the run itself.

    Raises:
        ValueError, OSError: an argument is out of range, or there is a state and no ``--resume``, or the other way round.
    """
    parser = arguments()
    args = parser.parse_args(argv)
    path = args.output / STATE_NAME
    if args.resume:
        state = load_state(path)
        parser.set_defaults(**(state.get("record") or {}).get("arguments", {}))
        parser.set_defaults(phases=[phase_text(Phase(**phase)) for phase in state["phases"]])
        args = parser.parse_args(argv)
    elif path.exists():
        raise ValueError(f"{path} is there already: continue that run with --resume, or choose another --output")
    if not 0 <= args.procedural <= 1:
        raise ValueError(f"--procedural {args.procedural:g}: the share of procedural images is a number from 0 to 1")
    if args.data is None and args.procedural < 1:
        raise ValueError("nothing to train on: give a folder of photographs with --data, or --procedural 1 to do without")
    if args.every < 1 or args.held_out < 1 or not 0 <= args.ema < 1 or not 0 <= (args.timestep or 0) < 1000:
        raise ValueError("--every and --held-out must be above 0, --ema at least 0 and below 1, --timestep from 0 to 999")
    settings = Settings(args.seed, args.train_encoder, args.ema, args.every, args.bf16, args.degradation, args.loss)
    phases = [parse_phase(text, (*PHASES, PHOTO)) for text in args.phases or DEFAULT_PHASES[1 if args.start else 0 :]]
    photo = None
    if any(phase.name == PHOTO for phase in phases):
        photo = PhotoSettings(**{part.name: getattr(args, part.name) for part in fields(PhotoSettings)})
    return TeacherRun(
        data=TrainingData(args.data, args.procedural, args.degradation, args.held_out),
        phases=phases,
        settings=settings,
        output=args.output,
        start=args.start,
        timestep=args.timestep,
        device=args.device,
        resume=args.resume,
        photo=photo,
    )


def main(argv: list[str] | None = None) -> None:
    run_training(arguments(), lambda progress: parse(argv).trainer(progress), "calibration.teacher.export")


if __name__ == "__main__":
    main()
