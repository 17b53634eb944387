"""Arguments of the search for a timestep, which `qartsr quantize` and `calibration/trq.py` share. Nothing heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qartsr_pipeline.calibration.retraining.settings import FULL, SHORT, TIMESTEPS, Rule, TimestepSearch, parse_phase

PHASE = "NAME:STEPS:LR:PATCH:BATCH"


def add_search_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Adds the arguments that `timestep_search` takes, under the same names."""
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


def timestep_search(
    timesteps: Sequence[int],
    phases: Sequence[str],
    full_phases: Sequence[str],
    least_bypass_cost: float,
    quality_margin: float,
    held_out: int,
) -> TimestepSearch:
    """The search that the arguments describe; raises ValueError that says what is wrong with them."""
    return TimestepSearch(
        timesteps=tuple(timesteps),
        phases=tuple(map(parse_phase, phases)),
        full_phases=tuple(map(parse_phase, full_phases)),
        rule=Rule(least_bypass_cost, quality_margin),
        held_out=held_out,
    )
