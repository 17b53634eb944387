"""Writes the trained small model as a full-precision QArtSRPipeline folder.

    python -m calibration.teacher.export runs/teacher/state.pt tiny-fp --data PHOTOS

The moving average of the weights is exported, in float16. `training.json` in the folder records what the model was trained with.
With `--blend OTHER SHARE`, that share of every weight is taken from OTHER, the model that training started from: the result lies
between the two also in what it does to images (Deep Network Interpolation, arXiv 1811.10515).
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.teacher.command import say_written
from calibration.teacher.model import TIMESTEP, new_model
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.fingerprint import photographs_record, versions
from qartsr_pipeline.calibration.data.pairs import choose_held_out
from qartsr_pipeline.calibration.data.patches import list_photographs
from qartsr_pipeline.calibration.report.pipeline_folder import TRAINING_RECORD, save_pipeline
from qartsr_pipeline.calibration.retraining.one_step_model import OneStepModel
from qartsr_pipeline.calibration.retraining.trainer import load_state

PATHS = ("start", "clips", "backbone", "alex", "distilled")  # arguments of which the record keeps the last part


@dataclass(frozen=True)
class Blend:
    """Another model, of which every weight takes a share from 0 to 1."""

    other: str
    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"--blend {self.other} {self.share:g}: the other model's share is a number from 0 to 1")


def export(
    state_path: str | Path,
    folder: str | Path,
    record: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
    blend: Blend | None = None,
) -> dict[str, int]:
    """Converts a training state into a pipeline folder, which appears complete or not at all.

    Args:
        state_path: ``state.pt`` of a training run, finished or not.
        folder: the pipeline folder. One that exists is replaced but for its README.md; anything else is left alone.
        record: what the state itself does not record: "seed", "timestep", and the entries of `data_record`.
        dtype: of the stored weights.
        blend: another model to mix in: the one that training started from, or one that started there, too.

    Returns:
        Bytes of each component's files, by the component's name, and their sum as "total".

    Raises:
        FileNotFoundError: there is no state. FileExistsError: `folder` exists and is not a pipeline folder.
        ValueError: not a training state, or one of a model of another shape; ``blend`` names a model of another one.
    """
    state = load_state(Path(state_path))
    pipeline = build_pipeline(state, dtype, record, blend)
    written = training_record(state, record)
    if blend is not None:
        written["validation_before_blend"] = written.pop("validation")
        written["blend"] = asdict(blend) | {"other": Path(blend.other).name}
    return save_pipeline(pipeline, folder, TRAINING_RECORD, written)


def build_pipeline(
    state: dict[str, Any],
    dtype: torch.dtype = torch.float16,
    record: dict[str, Any] | None = None,
    blend: Blend | None = None,
) -> QArtSRPipeline:
    """The averaged weights of a training state as a pipeline on the CPU; arguments as in `export`."""
    recorded = {**(record or {}), **(state.get("record") or {})}
    timestep = recorded.get("timestep", TIMESTEP)
    start = (recorded.get("arguments") or {}).get("start")
    with torch.random.fork_rng(devices=[]):
        model = OneStepModel.from_pretrained(start) if start else new_model(recorded.get("seed") or 0, timestep)
    model.set_timestep(timestep)
    try:
        model.load_state_dict(state["average"])
    except RuntimeError as error:
        raise ValueError(
            f"the training state is of a model of another shape than {start or 'calibration/teacher/model.py builds'}:"
            f" export it with the code that trained it. {' '.join(str(error).split())[:300]}"
        ) from error
    if blend is not None:
        mix(model, blend)
    return model.to_pipeline(dtype)


def mix(model: OneStepModel, blend: Blend) -> None:
    """Moves every weight of ``model`` by that share of the way to the other model's.

    Raises:
        ValueError: the other model is of another shape, at another timestep, or of latents of another scale.
    """
    other = OneStepModel.from_pretrained(blend.other)
    weights, others = model.state_dict(), other.state_dict()
    same = {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in others.items()}
    if not same or other.timestep != model.timestep or not torch.isclose(other.scaling_factor, model.scaling_factor, rtol=1e-3):
        raise ValueError(
            f"{blend.other} is no relative of the trained model: layers, timestep ({other.timestep} and {model.timestep}) and the"
            " scale of latents must be the same. Blend with the model that training started from"
        )
    model.load_state_dict({name: torch.lerp(value, others[name], blend.share) for name, value in weights.items()})


def training_record(state: dict[str, Any], record: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `training.json` says: how far training went, seed, versions, data. Unknown entries are None."""
    recorded = {**(record or {}), **(state.get("record") or {})}
    arguments = {
        name: Path(value).name if name in PATHS and value else value
        for name, value in (recorded.get("arguments") or {}).items()
        if name != "data"
    }  # without paths of the machine
    return {
        "phases": state["phases"],
        "phases_finished": state["phase_index"],
        "steps_into_next_phase": state["step"],
        "seed": recorded.get("seed"),
        "timestep": recorded.get("timestep", TIMESTEP),
        "arguments": arguments or None,
        "data": recorded.get("data"),
        "held_out": recorded.get("held_out"),
        "training_versions": recorded.get("versions"),
        "export_versions": versions(),
        "validation": state["history"][-1] if state["history"] else None,
    }


def data_record(data: str | Path, held_out: int) -> dict[str, Any]:
    """The entries "data" and "held_out" of a state's record.

    Args:
        data: the photograph folder.
        held_out: how many photographs were kept for validation.
    """
    paths = list_photographs(data)
    kept = [path.name for path in choose_held_out(paths, held_out)]
    return {"data": photographs_record(paths), "held_out": kept}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="calibration.teacher.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("state", help="state.pt of a training run")
    parser.add_argument("folder", help="the pipeline folder to write")
    parser.add_argument("--blend", nargs=2, metavar=("OTHER", "SHARE"), help="take that share of every weight from another model")
    older = parser.add_argument_group("for states that do not record what they were trained with")
    older.add_argument("--data", help="photograph folder trained on")
    older.add_argument("--seed", type=int, default=0)
    older.add_argument("--timestep", type=int, default=TIMESTEP)
    older.add_argument("--held-out", type=int, default=8, help="photographs kept for validation")
    args = parser.parse_args(argv)
    try:
        record = {"seed": args.seed, "timestep": args.timestep}
        if args.data:
            record |= data_record(args.data, args.held_out)
        blend = Blend(args.blend[0], float(args.blend[1])) if args.blend else None
        sizes = export(args.state, args.folder, record, blend=blend)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    say_written(sizes, args.folder)


if __name__ == "__main__":
    main()
