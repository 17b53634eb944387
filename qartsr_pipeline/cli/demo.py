"""`qartsr demo`: a photograph is reduced to 128 x 128, enlarged again by the quantized model, and compared with the original.

Twice: reduced and nothing else, and as photographs often come, blurred, noisy, and saved as JPEG (`real_degradation`). Each
comparison is written as an image, and both on one page with a slider between any two results.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT, fetch, shipped_checkpoints
from qartsr_pipeline.cli.arguments import add_debug, add_model_option
from qartsr_pipeline.image.comparison_page import Comparison, NamedImage, comparison_page
from qartsr_pipeline.image.comparison_sheet import comparison_sheet
from qartsr_pipeline.image_files import ImageFile, check_writable, read_image, write_image
from qartsr_pipeline.whole_files import make_folder, write_whole

if TYPE_CHECKING:
    from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "rider.jpg"
FULL_PRECISION = "tiny-fp"  # what a model is compared with whose record names no shipped one
FP, Q = "full precision", "quantized"
SCALE = 4
# The part that is shown larger below the whole images: left, top, right, bottom in the original.
DETAIL = (150, 100, 278, 228)
PAGE = "compare.html"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("demo", description="Upscales the sample photograph on the CPU and compares the result.")
    parser.add_argument("-o", "--output", default="demo_output", metavar="FOLDER", help="default: demo_output")
    add_model_option(parser)
    add_debug(parser)
    parser.set_defaults(run=lambda options: run(options.output, options.model))


def run(output: str | Path, model: str = DEFAULT_CHECKPOINT, full_precision: str | None = None) -> int:
    """Upscales on the CPU, writes the images and the page to the folder `output`, prints what was done; returns 0.

    The last line is `demo: psnr_y bicubic=.. full_precision=.. quantized=.. seconds=.. picture=PATH`, of the clean image; the one
    before, which begins with `demo real:`, is of the degraded one.

    Args:
        full_precision: what the model is compared with; None for the shipped model that it was made of, or tiny-fp.
    """
    folder = Path(output)
    make_folder(folder)
    check_writable(folder / "comparison.png")
    import torch

    from qartsr_pipeline.calibration.data.degradations import real_degradation
    from qartsr_pipeline.calibration.data.patches import as_pixels, as_tensor
    from qartsr_pipeline.cli.description import describe, kernels
    from qartsr_pipeline.loading import load_quietly

    full_precision = full_precision or _made_of(model)
    pipelines = {name: load_quietly(folder, dtype=torch.float32) for name, folder in {FP: full_precision, Q: model}.items()}
    original = read_image(SAMPLE).pixels
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
        pipeline(original[:32, :32], upscale=SCALE)  # the first call prepares kernels
    degraded = as_pixels(real_degradation(as_tensor(original), SCALE, np.random.default_rng(0)))
    print(f"sample: {SAMPLE.name}, {_size(original)} (credits: {SAMPLE.parent / 'CREDITS.md'}), reduced to {_size(degraded)}")
    print(f"model: {fetch(model)}, compared with {fetch(full_precision)}, on the CPU in float32")
    print(f"kernels: {kernels(describe(fetch(model), 'cpu').components)}")
    real, real_numbers = _compare(pipelines, original, degraded, folder, "_real")
    clean, numbers = _compare(pipelines, original, _bicubic(original, 1 / SCALE), folder, "")
    page = comparison_page(f"{SAMPLE.name}, enlarged {SCALE} times", [real, clean], f"{Path(model).name}, on the CPU in float32.")
    write_whole(folder / PAGE, page)
    print(f"written: {folder / PAGE} (open it in a browser)")
    print("PSNR rewards blur: a model trained for how images look can have less than bicubic. Judge by the images.")
    print(real_numbers, numbers, sep="\n")
    return 0


def _made_of(model: str) -> str:
    """The shipped full-precision model that a checkpoint's record names."""
    record = fetch(model) / "quantization.json"
    name = json.loads(record.read_text(encoding="utf-8")).get("model") if record.is_file() else None
    return name if name in shipped_checkpoints() else FULL_PRECISION


def _compare(
    pipelines: dict[str, QArtSRPipeline], original: np.ndarray, reduced: np.ndarray, folder: Path, ending: str
) -> tuple[Comparison, str]:
    """Enlarges one input by all pipelines, and writes its images with ``ending`` in their names.

    Returns:
        The results for the page, and the line of numbers.
    """
    from qartsr_pipeline.image.metrics import psnr_y

    results = {name: _enlarge(pipeline, reduced) for name, pipeline in pipelines.items()}
    images = {"bicubic": _bicubic(reduced, SCALE)} | {name: image for name, (image, _) in results.items()}
    scores = {name: psnr_y(_floats(image), _floats(original)) for name, image in images.items()}
    captions = {f"{name}, {scores[name]:.2f} dB": image for name, image in images.items()} | {"original": original}
    for name, image in {"input": reduced, "upscaled": images[Q], "comparison": comparison_sheet(captions, DETAIL)}.items():
        path = folder / f"{name}{ending}.png"
        write_image(path, _floats(image), ImageFile(image))
        print(f"written: {path}")
    said = {name: f"{score:.2f} dB" for name, score in scores.items()}
    said |= {name: f"{said[name]}, {seconds:.2f} s" for name, (_, seconds) in results.items()}
    versions = [NamedImage(name, image, said.get(name, "")) for name, image in {**images, "original": original}.items()]
    title = "Blurred, noisy, saved as JPEG" if ending else "Reduced and nothing else"
    comparison = Comparison(title, versions, f"{_size(reduced)}, enlarged {SCALE} times", left=0, right=2)
    return comparison, (
        f"demo{ending.replace('_', ' ')}: psnr_y bicubic={scores['bicubic']:.2f} full_precision={scores[FP]:.2f}"
        f" quantized={scores[Q]:.2f} seconds={results[Q][1]:.2f} picture={folder / f'comparison{ending}.png'}"
    )


def _enlarge(pipeline: QArtSRPipeline, image: np.ndarray) -> tuple[np.ndarray, float]:
    """The pipeline's result, 8 bits, and the seconds that a call takes once kernels are prepared."""
    start = time.perf_counter()
    result: np.ndarray = pipeline(image, upscale=SCALE, output_type="np", return_dict=False)[0][0]
    return np.rint(result * 255).astype(np.uint8), time.perf_counter() - start


def _bicubic(pixels: np.ndarray, factor: float) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]} x {pixels.shape[0]}"


def _floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / 255
