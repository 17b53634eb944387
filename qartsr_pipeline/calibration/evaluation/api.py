"""`evaluate`: models measured on images."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch

from qartsr_pipeline.calibration.data.degradations import DEGRADATIONS
from qartsr_pipeline.calibration.data.fingerprint import check_no_overlap
from qartsr_pipeline.calibration.evaluation.measurement import (
    BICUBIC,
    COLOR_FIXES,
    ORIGINAL,
    Candidate,
    Evaluation,
    ImageOutputs,
    Progress,
)
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN, load_metrics
from qartsr_pipeline.calibration.evaluation.originals import Data, originals_of
from qartsr_pipeline.calibration.evaluation.peers import Upscaler, check_complete, peers_of
from qartsr_pipeline.calibration.evaluation.rows import E_WARP, EvaluationRow
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.loading import load_quietly
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

Model: TypeAlias = QArtSRPipeline | str | os.PathLike
ALIGNMENTS = ("wavelet", "adain", None)


def evaluate(
    models: Model | Sequence[Model] | Mapping[str, Model],
    data: Data,
    *,
    metrics: Sequence[str] = tuple(BUILT_IN),
    degradation: str = "bicubic",
    color_fixes: Sequence[str | None] = COLOR_FIXES,
    tile_size: int | None = None,
    bypass: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    ground_truth: bool = True,
    peers: Mapping[str, Upscaler | str | os.PathLike] | None = None,
    backbones: str | os.PathLike | None = None,
    progress: Progress | None = None,
    on_image: Callable[[ImageOutputs], None] | None = None,
) -> list[EvaluationRow]:
    """Measures models on images, beside bicubic enlargement. Prints nothing.

    An original is cut to multiples of 4, reduced by 4, rounded to 8 bits, and enlarged again by every model; outputs are
    rounded to 8 bits and compared with the original. If the first model is in full precision, the others' outputs are compared
    with its outputs as well.

    Args:
        models: a pipeline, a checkpoint folder, the name of a shipped model or a Hub id; several of them; or a name for the rows
            -> one of them. Pipelines without a name are called "model 1", "model 2", .. by their place.
        data: a folder of high-resolution images, or of pairs as DIV2K and RealSR lay them out, which bring their low-resolution
            images; or a list of originals: PIL images, arrays, tensors (see `QArtSRPipeline.__call__`) or files.
        metrics: "psnr_y" and "ssim_y" (of the BT.601 luma, without a border of 4 pixels); "lpips" (AlexNet), "lpips_vgg" and
            "dists", which need the extra `metrics` and backbones; or names of the optional package pyiqa: "niqe", "musiq", ..
            All of these but pyiqa's without reference need ground truth.
        degradation: how an original is reduced: "bicubic", or with blur, noise and JPEG: "real", "photo", "realesrgan".
        color_fixes: colour alignments to measure: "wavelet", "adain", None for the network's own colours. A row for each.
        tile_size: side of the tiles in pixels of the output; None for whole images.
        bypass: also measure models in full precision without their UNet, and their autoencoder on the original.
        device, dtype: for models that are loaded here; None for the CPU and what the folder stores. A pipeline stays as it is.
        ground_truth: False if ``data`` are low-resolution images themselves. Then metrics that need ground truth are measured
            only between a model's output and that of the first model, in full precision.
        peers: name of a row -> another upscaler to measure: a function of (1, 3, h, w) to (1, 3, 4h, 4w), float32 in [0, 1], such
            as `evaluation.peers.lanczos` and `RealEsrgan`; or a folder with its outputs, matched by file name.
        backbones: folder with the files of LPIPS' and DISTS' backbones; None to look for them and, where they are not on this
            machine, to download them. See `qartsr_pipeline.calibration.backbones`.
        progress: called with the image's name, and how many of how many enlargements are done.
        on_image: called with each image's outputs.

    Returns:
        A row for bicubic, for each peer, then for each model and colour alignment.

    Raises:
        ValueError: an argument that is not among those listed; an image that a model was made with, by its record; an image that
            a model or metric cannot take; an output that is not finite or, of a peer, of another size; a backbone's file that is
            damaged; without ground truth, nothing to measure.
        OSError: no such folder, image or backbone, or a peer's output is missing.
        CheckpointError: a model that is damaged or unavailable.
        ImportError: a metric's package is not installed.

    Example:
        >>> from importlib.resources import files
        >>> from PIL import Image
        >>> from qartsr_pipeline import evaluate
        >>> photograph = Image.open(files("qartsr_pipeline") / "samples" / "rider.jpg").crop((160, 80, 256, 176))
        >>> bicubic, full, quantized = evaluate(["tiny-fp", "tiny-w4a4"], [photograph], color_fixes=["wavelet"])
        >>> quantized.name, quantized.images
        ('tiny-w4a4', 1)
        >>> quantized.values["psnr_y"] > bicubic.values["psnr_y"]
        True
        >>> quantized.closer_than_bicubic > 0  # dB to the outputs of tiny-fp
        True
    """
    if degradation not in DEGRADATIONS:
        raise ValueError(f"there is no degradation {degradation!r}; expected {' or '.join(DEGRADATIONS)}")
    for color_fix in color_fixes:
        if color_fix not in ALIGNMENTS:
            raise ValueError(f"there is no colour alignment {color_fix!r}; expected 'wavelet', 'adain' or None")
    if not color_fixes:
        raise ValueError("`color_fixes` is empty: give at least one alignment, such as None for the network's own colours")
    if bypass and not ground_truth:
        raise ValueError("`bypass` reproduces the originals, so it needs ground truth: leave it out")
    if E_WARP in metrics:
        raise ValueError(f"{E_WARP} is measured on clips, from frame to frame: use `evaluate_clips`, or --clips, or leave it out")
    others = peers_of(peers or {})
    named = named_models(models, needed=not others)
    taken = [name for name in others if name in (*named, BICUBIC, ORIGINAL)]
    if taken:
        raise ValueError(f"there are two rows named {taken[0]!r}: give the peer another name")
    originals = originals_of(data, ground_truth)
    check_complete(others, originals)
    loaded = load_metrics(metrics, "cpu" if device is None else str(device), backbones)
    folders = {name: model if isinstance(model, QArtSRPipeline) else fetch(model) for name, model in named.items()}
    files = [path for original in originals for path in original.files]
    check_unseen([folder for folder in folders.values() if isinstance(folder, Path)], files)
    candidates = [
        Candidate.of(name, each if isinstance(each, QArtSRPipeline) else load_model(each, dtype, device))
        for name, each in folders.items()
    ]
    evaluation = Evaluation(candidates, loaded, color_fixes, tile_size, bypass, degradation, others)
    compared = evaluation.reference is not None and len(candidates) > 1
    if not (ground_truth or compared) and all(metric.needs_reference for metric in loaded.values()):
        raise ValueError(
            f"without ground truth, {', '.join(loaded)} can only be measured against a model in full precision: give one first"
            " and another one after it, or a metric without reference, such as niqe of pyiqa"
        )
    evaluation.progress, evaluation.on_image = progress, on_image
    return evaluation.run(originals)


def check_unseen(folders: Sequence[Path], files: Sequence[Path]) -> None:
    """Raises ValueError if a model's record lists one of the originals' files as one that the model was made with."""
    for folder in folders:
        check_no_overlap(files, folder)


def row_names(models: Sequence[str]) -> dict[str, str]:
    """Model -> name of its rows: the last part, or the whole where two end alike. Raises ValueError if one is given twice."""
    if len(set(models)) < len(models):
        raise ValueError("a model is given twice: name each one once")
    short = [Path(model).name for model in models]
    return {model: name if short.count(name) == 1 else model for model, name in zip(models, short, strict=True)}


P = TypeVar("P", bound=CheckpointPipeline)


def named_models(
    models: P | str | os.PathLike | Sequence[P | str | os.PathLike] | Mapping[str, P | str | os.PathLike], needed: bool = True
) -> dict[str, P | str | os.PathLike]:
    """Name of its rows -> model, as `evaluate` says. Raises ValueError if there is none and one is ``needed``."""
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        given = [models] if isinstance(models, (CheckpointPipeline, str, os.PathLike)) else list(models)
        texts = row_names([os.fspath(model) for model in given if not isinstance(model, CheckpointPipeline)])
        named = {
            f"model {number}" if isinstance(model, CheckpointPipeline) else texts[os.fspath(model)]: model
            for number, model in enumerate(given, 1)
        }
    if not named and needed:
        raise ValueError("`models` is empty: give at least one model, or a peer")
    return named


def load_model(folder: Path, dtype: torch.dtype | None, device: str | torch.device | None) -> QArtSRPipeline:
    """The pipeline of a checkpoint folder; None for the folder's own dtype and for the CPU."""
    pipeline = load_quietly(folder, **({} if dtype is None else {"dtype": dtype}))
    return pipeline if device is None else pipeline.to(device)
