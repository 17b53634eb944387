"""Writes the trained small video model as a full-precision LSGQuantVideoPipeline folder.

    python -m calibration.teacher.video.export runs/video/state.pt video-fp

The moving average of the weights is exported, in float16. `training.json` in the folder records what the model was trained with.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from calibration.teacher.command import say_written
from calibration.teacher.export import training_record
from calibration.teacher.video.model import TIMESTEP, new_model
from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.calibration.report.pipeline_folder import TRAINING_RECORD, save_pipeline
from qartsr_pipeline.calibration.retraining.trainer import load_state


def export(state_path: str | Path, folder: str | Path, dtype: torch.dtype = torch.float16) -> dict[str, int]:
    """Converts a training state into a pipeline folder, which appears complete or not at all.

    Args:
        state_path: ``state.pt`` of a training run, finished or not.
        folder: the pipeline folder. One that exists is replaced but for its README.md; anything else is left alone.
        dtype: of the stored weights.

    Returns:
        Bytes of each component's files, by the component's name, and their sum as "total".

    Raises:
        FileNotFoundError: there is no state. FileExistsError: `folder` exists and is not a pipeline folder.
        ValueError: not a training state, or one of a model of another shape.
    """
    state = load_state(Path(state_path))
    record = training_record(state) | {"clips": (state.get("record") or {}).get("clips")}
    return save_pipeline(build_pipeline(state, dtype), folder, TRAINING_RECORD, record)


def build_pipeline(state: dict[str, Any], dtype: torch.dtype = torch.float16) -> LSGQuantVideoPipeline:
    """The averaged weights of a training state as a pipeline on the CPU. Its tiles and chunks are as large as the last clips that
    the model was trained on."""
    recorded = state.get("record") or {}
    with torch.random.fork_rng(devices=[]):
        model = new_model(recorded.get("seed") or 0, recorded.get("timestep", TIMESTEP))
    try:
        model.load_state_dict(state["average"])
    except RuntimeError as error:
        raise ValueError(
            "the training state is of a model of another shape than calibration/teacher/video/model.py builds: export it with the"
            f" code that trained it. {' '.join(str(error).split())[:300]}"
        ) from error
    phase = state["phases"][min(state["phase_index"], len(state["phases"]) - 1)]
    frames = (recorded.get("arguments") or {}).get("frames", 5)
    return model.to_pipeline(dtype, tile_size=phase["patch"], frames_per_chunk=frames)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="calibration.teacher.video.export", description=__doc__.split("\n\n")[0])
    parser.add_argument("state", help="state.pt of a training run")
    parser.add_argument("folder", help="the pipeline folder to write")
    args = parser.parse_args(argv)
    try:
        sizes = export(args.state, args.folder)
    except (OSError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    say_written(sizes, args.folder)


if __name__ == "__main__":
    main()
