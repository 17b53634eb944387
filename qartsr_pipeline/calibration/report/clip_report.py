"""The report of a finished calibration run of a video model: measured on clips, with a frame and a film strip of each."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from qartsr_pipeline.calibration.data.clips import is_video_file, read_clip
from qartsr_pipeline.calibration.data.patches import as_pixels
from qartsr_pipeline.calibration.evaluation.clips import ClipModel, ClipOutputs, evaluate_clips
from qartsr_pipeline.calibration.report.report import write_report
from qartsr_pipeline.calibration.report.run_report import SHOWN, FinishedRun, RunReport, report_data, shown_versions
from qartsr_pipeline.image.comparison_sheet import film_strip


def make_clip_report(run: FinishedRun, folder: Path) -> RunReport:
    """As `run_report.make_report`; the files to measure on are video files, and the frames of clips, a folder each. Middle frames
    are shown."""
    clips: dict[Path, list[Path]] = {}
    for path in map(Path, run.evaluation):
        clips.setdefault(path if is_video_file(path) else path.parent, []).append(path)
    common = Path(os.path.commonpath([place.parent for place in clips]))
    read = {place.relative_to(common).as_posix(): read_clip(place.name, paths) for place, paths in clips.items()}
    models = {run.model_name: run.full_precision, f"{run.recipe.method} {run.bits}": run.quantized}
    shown: list[dict[str, np.ndarray]] = []
    strips: dict[str, np.ndarray] = {}

    def keep(clip: ClipOutputs) -> None:
        versions = {"low resolution": clip.low.split(1), **clip.outputs}
        if len(shown) < SHOWN:
            versions_shown = {name: [as_pixels(frame) for frame in frames] for name, frames in clip.outputs.items()}
            strips[clip.name] = film_strip(versions_shown, run.model_name)
            shown.append(shown_versions({name: frames[len(frames) // 2] for name, frames in versions.items()}))

    rows = evaluate_clips(cast(Mapping[str, ClipModel], models), read, on_clip=keep)
    return RunReport(write_report(folder, report_data(run, rows, shown, strips)), rows)
