"""What `qartsr evaluate` does with clips: measures, and writes film strips. The report is written as for images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qartsr_pipeline.calibration.data.clips import clip_files, has_images, video_files_in
from qartsr_pipeline.calibration.data.fingerprint import data_fingerprint, hardware, recorded_files, versions
from qartsr_pipeline.calibration.data.patches import as_pixels
from qartsr_pipeline.calibration.evaluation.api import row_names
from qartsr_pipeline.calibration.evaluation.clips import ClipOutputs, evaluate_clips, is_video_model
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.cli.evaluate_models import Request, made_by
from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image.comparison_sheet import film_strip
from qartsr_pipeline.image_files import ImageFile, write_image
from qartsr_pipeline.whole_files import make_folder

CLIPS = "clips"  # beside the layouts of `find_pairs`


def of_clips(request: Request) -> bool:
    """Whether clips are to be measured: asked for, or there is a video model, or the folder holds video files and no image."""
    if request.clips or any(is_video_model(fetch(model)) for model in request.models):
        return True
    return bool(video_files_in(request.data)) and not has_images(request.data)


def measure_clips(request: Request) -> tuple[list[EvaluationRow], dict[str, Any]]:
    """Runs the evaluation with a progress bar; the rows, and the report that is written as JSON.

    Raises:
        UsageError: an option that is for images.
    """
    check_options(request)
    device, _ = choose_device(request.device)
    peers = {name: each for name, each in request.peers().items() if callable(each)}
    clips = dict(list(clip_files(request.data).items())[: request.limit])
    names = row_names(request.models)
    checkpoints = {names[model]: fetch(model) for model in request.models}
    if request.pictures:
        make_folder(request.pictures)
    measured: dict[str, int] = {}
    with tqdm(unit="run", total=len(clips) * (1 + len(peers) + len(checkpoints))) as bar:

        def show(clip: str, row: str) -> None:
            bar.set_postfix_str(f"{clip}: {row}", refresh=False)
            bar.update()

        def keep(clip: ClipOutputs) -> None:
            measured[clip.name] = len(clip.outputs["original"])
            if request.pictures:
                write_strip(strip_path(request.pictures, clip.name), clip, next(iter(checkpoints), None))

        rows = evaluate_clips(
            checkpoints,
            clips,
            metrics=list(dict.fromkeys([*BUILT_IN, *request.metrics])),
            frames=request.frames,
            align_color=not request.no_color_fix,
            tile_size=request.tile_size,
            device=device,
            dtype=getattr(torch, request.dtype),
            peers=peers,
            backbones=request.backbones,
            progress=show,
            on_clip=keep,
        )
    files = [path for paths in clips.values() for path in paths]
    return rows, {
        "data": {
            "folder": request.data.resolve().name,
            "layout": CLIPS,
            **data_fingerprint(files),
            "count": len(clips),
            "files": len(files),
            "clips": measured,
            "comparisons": [strip_path(request.pictures, name).name for name in clips] if request.pictures else [],
            "page": None,
            "unseen_by_record": {name: recorded_files(checkpoint) is not None for name, checkpoint in checkpoints.items()},
        },
        "made_by": {name: made_by(checkpoint) for name, checkpoint in checkpoints.items()},
        "settings": {
            "scale": 4,
            "degradation": "bicubic, 8 bits",
            "ground_truth": True,
            "peers": list(peers),
            "border": 4,
            "tile_size": request.tile_size,
            "dtype": request.dtype,
        },
        "hardware": hardware(device),
        "versions": versions(),
        "rows": [row.to_json() for row in rows],
    }


def check_options(request: Request) -> None:
    """Raises UsageError for an option that is for images."""
    given = {
        "--no-ground-truth": request.no_ground_truth,
        "--bypass": request.bypass,
        "--outputs": request.outputs,
        "--color-fix": request.color_fix,
        "--degradation": request.degradation != "bicubic",
    }
    wrong = [option for option, is_given in given.items() if is_given]
    if wrong:
        raise UsageError(
            f"{wrong[0]} is for images, but {request.data} is measured as clips, which are reduced bicubically and keep the"
            " colour alignment of their pipeline (--no-color-fix: none). Leave it out, or measure image models on images."
        )


def strip_path(folder: Path, clip: str) -> Path:
    """Where a clip's film strip goes; its name may hold folders."""
    return folder / f"{clip.replace('/', '_')}.png"


def write_strip(path: Path, clip: ClipOutputs, reference: str | None) -> None:
    """All outputs below one another under their names, and their differences from the first model's."""
    frames = {name: [as_pixels(frame) for frame in outputs] for name, outputs in clip.outputs.items()}
    strip = film_strip(frames, reference)
    write_image(path, strip.astype("float32") / 255, ImageFile(strip))
