"""`qartsr demo`: a photograph is reduced to 128 x 128, enlarged again by the quantized model, and compared with the original."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT, fetch
from qartsr_pipeline.cli.arguments import add_debug, add_model_option
from qartsr_pipeline.image.comparison import compare
from qartsr_pipeline.image_files import ImageFile, check_writable, make_folder, read_image, write_image

if TYPE_CHECKING:
    from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "rider.jpg"
FULL_PRECISION = "tiny-fp"
SCALE = 4
# The part that is shown larger below the whole images: left, top, right, bottom in the original.
DETAIL = (150, 100, 278, 228)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the command's parser."""
    parser = subparsers.add_parser("demo", description="Upscales the sample photograph on the CPU and compares the result.")
    parser.add_argument("-o", "--output", default="demo_output", metavar="FOLDER", help="default: demo_output")
    add_model_option(parser)
    add_debug(parser)
    parser.set_defaults(run=lambda options: run(options.output, options.model))


def run(output: str | Path, model: str = DEFAULT_CHECKPOINT, full_precision: str = FULL_PRECISION) -> int:
    """Upscales on the CPU, writes the images to the folder `output`, prints what was done; returns 0.

    The last line is `demo: psnr_y bicubic=.. full_precision=.. quantized=.. seconds=.. picture=PATH`.
    """
    folder = Path(output)
    make_folder(folder)
    check_writable(folder / "comparison.png")
    import torch

    from qartsr_pipeline.cli.description import describe, kernels
    from qartsr_pipeline.image.metrics import psnr_y
    from qartsr_pipeline.loading import load_quietly

    original = read_image(SAMPLE).pixels
    reduced = _bicubic(original, 1 / SCALE)
    reference, _ = _enlarge(load_quietly(full_precision, dtype=torch.float32), reduced)
    quantized, seconds = _enlarge(load_quietly(model, dtype=torch.float32), reduced)
    images = {"bicubic": _bicubic(reduced, SCALE), "full precision": reference, "quantized": quantized}
    scores = {name: psnr_y(_floats(image), _floats(original)) for name, image in images.items()}
    captions = {f"{name}, {scores[name]:.2f} dB": image for name, image in images.items()} | {"original": original}
    for name, image in {"input": reduced, "upscaled": quantized, "comparison": compare(captions, DETAIL)}.items():
        write_image(folder / f"{name}.png", _floats(image), ImageFile(image))
    print(f"sample: {SAMPLE.name}, {_size(original)}, reduced to {_size(reduced)} (credits: {SAMPLE.parent / 'CREDITS.md'})")
    print(f"model: {fetch(model)}, compared with {fetch(full_precision)}, on the CPU in float32")
    print(f"kernels: {kernels(describe(fetch(model), 'cpu'))}")
    for name in ("input", "upscaled", "comparison"):
        print(f"written: {folder / name}.png")
    print(
        f"demo: psnr_y bicubic={scores['bicubic']:.2f} full_precision={scores['full precision']:.2f}"
        f" quantized={scores['quantized']:.2f} seconds={seconds:.2f} picture={folder / 'comparison.png'}"
    )
    return 0


def _enlarge(pipeline: QArtSRPipeline, image: np.ndarray) -> tuple[np.ndarray, float]:
    """The pipeline's result, 8 bits, and the seconds that the call took."""
    pipeline.set_progress_bar_config(disable=True)
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
