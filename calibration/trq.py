"""Finds the timestep at which a one-step model bears quantization best, and retrains the model there.

    python calibration/trq.py MODEL --timesteps 20 100 250 500 999 --data PHOTOS --output runs/trq

`qartsr_pipeline.calibration.trq` describes the method and the output folder. Called again with the same arguments, it continues
where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from qartsr_pipeline.calibration.data import DEGRADATION_NAMES
from qartsr_pipeline.calibration.data.pairs import TrainingData
from qartsr_pipeline.calibration.perceptual import Lpips
from qartsr_pipeline.calibration.recipe import check_quantizes, parse_bits
from qartsr_pipeline.calibration.retraining.settings import (
    FULL,
    RETRAINING_LOSSES,
    SHORT,
    TIMESTEPS,
    Rule,
    Settings,
    TimestepSearch,
)
from qartsr_pipeline.calibration.training.progress import Progress, Stopped
from qartsr_pipeline.calibration.trq import TRQ
from qartsr_pipeline.cli.training_bar import TrainingBar
from qartsr_pipeline.whole_files import SavingError, make_folder

PHASE = "NAME:STEPS:LR:PATCH:BATCH"
ADAPTERS = {"auto": None, "all": False, "adapters": True}


def add_search_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the arguments of `TimestepSearch.parse`, under the same names."""
    parser.add_argument("--timesteps", type=int, nargs="+", default=list(TIMESTEPS), metavar="T", help="candidates")
    parser.add_argument(
        "--phases", nargs="+", default=list(SHORT), metavar=PHASE, help=f"at each candidate (default: {' '.join(SHORT)})"
    )
    parser.add_argument(
        "--full-phases", nargs="+", default=list(FULL), metavar=PHASE, help=f"at the chosen one (default: {' '.join(FULL)})"
    )
    parser.add_argument(
        "--least-bypass-cost", type=float, default=Rule.least_bypass_cost, metavar="DB",
        help="what leaving the UNet out must cost at a timestep that may be chosen (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quality-margin", type=float, default=Rule.quality_margin, metavar="DB",
        help="a full-precision quality this little below the best one counts as equal (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--held-out", type=int, default=8, metavar="N", help="images kept for measuring (default: %(default)s)")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="full-precision pipeline folder, shipped name or Hub id")
    add_search_arguments(parser)
    parser.add_argument("--data", help="folder of photographs; without it, procedural images are used")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything; its `model` is the result")
    parser.add_argument("--sweep-only", action="store_true", help="stop before the full training at the chosen timestep")
    parser.add_argument("--bits", default="w4a4", help="of the plain quantization (default: w4a4)")
    parser.add_argument(
        "--train", choices=tuple(ADAPTERS), default="auto", help="UNet weights (default: adapters for large models)"
    )
    parser.add_argument("--train-encoder", action="store_true", help="train the VAE encoder in the pixel phase, as OSEDiff does")
    parser.add_argument("--loss", choices=RETRAINING_LOSSES, default="l1", help="l2+lpips is the paper's (default: %(default)s)")
    parser.add_argument("--perceptual-weights", metavar="FILE", help="the backbone of LPIPS: a file, or a folder with one")
    parser.add_argument("--degradation", choices=DEGRADATION_NAMES, default="bicubic")
    parser.add_argument("--every", type=int, default=250, metavar="N", help="steps between validations, each of which is saved")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fp32", dest="bf16", action="store_false", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    return parser


def stage_of(args: argparse.Namespace, progress: Progress) -> TRQ:
    """The stage that the arguments describe; raises ValueError or OSError that says what is wrong with them."""
    if args.held_out < 1 or args.every < 1:
        raise ValueError("--held-out and --every must be above 0")
    bits = parse_bits(args.bits)
    check_quantizes(bits)
    rule = (args.least_bypass_cost, args.quality_margin)
    search = TimestepSearch.parse(args.timesteps, args.phases, args.full_phases, *rule, args.held_out, bits)
    distance, _, lpips = args.loss.partition("+")
    settings = Settings(
        seed=args.seed,
        train_encoder=args.train_encoder,
        every=args.every,
        bf16=args.bf16,
        degradation=args.degradation,
        loss=distance,
        adapters=ADAPTERS[args.train],
    )
    data = TrainingData(args.data, 0.0 if args.data else 1.0, args.degradation, args.held_out).load()
    perceptual = Lpips("vgg", args.perceptual_weights).to(args.device) if lpips else None
    make_folder(args.output)
    return TRQ(args.model, data, args.output, search, settings, perceptual, args.device, progress)


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        with TrainingBar() as bar:
            stage = stage_of(args, bar)
            if args.sweep_only:
                stage.sweep()
                written = args.output / "sweep.md"
            else:
                written = stage.run()
    except Stopped as stopped:
        parser.exit(130, f"\n{stopped}\n")
    except SavingError as error:
        parser.error(f"{error} Then call it again: it continues from what was saved.")
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        parser.error(" ".join(str(error).split()))
    print((args.output / "sweep.md").read_text(encoding="utf-8"))
    print(f"written: {written}")


if __name__ == "__main__":
    main()
