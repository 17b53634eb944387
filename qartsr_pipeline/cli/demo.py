"""`qartsr demo`: a photograph is reduced to 128 x 128, enlarged again by the quantized model, and compared with the original."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from PIL import Image

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT
from qartsr_pipeline.image.comparison import compare
from qartsr_pipeline.image_files import PictureFile, check_writable, make_folder, read_picture, write_picture

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "rider.jpg"
FULL_PRECISION = "tiny-fp"
SCALE = 4
# What is shown enlarged below the whole pictures: left, top, right, bottom in the original.
DETAIL = (150, 100, 278, 228)


def run(output: str | Path, model: str = DEFAULT_CHECKPOINT, full_precision: str = FULL_PRECISION) -> int:
    """Upscales on the CPU, writes the pictures to the folder `output`, prints what was done; returns 0.

    The last line is `demo: psnr_y bicubic=.. full_precision=.. quantized=.. seconds=.. picture=PATH`.
    """
    from qartsr_pipeline.image.metrics import psnr_y

    folder = Path(output)
    make_folder(folder)
    check_writable(folder / "comparison.png")
    original = read_picture(SAMPLE).pixels
    reduced = _bicubic(original, 1 / SCALE)
    reference, _ = _enlarge(full_precision, reduced)
    quantized, seconds = _enlarge(model, reduced)
    pictures = {"bicubic": _bicubic(reduced, SCALE), "full precision": reference, "quantized": quantized}
    scores = {name: psnr_y(_floats(picture), _floats(original)) for name, picture in pictures.items()}
    captions = {f"{name}, {scores[name]:.2f} dB": picture for name, picture in pictures.items()} | {"original": original}
    for name, picture in {"input": reduced, "upscaled": quantized, "comparison": compare(captions, DETAIL)}.items():
        write_picture(folder / f"{name}.png", _floats(picture), PictureFile(picture))
    print(f"sample: {SAMPLE.name}, {_size(original)}, reduced to {_size(reduced)} (credits: {SAMPLE.parent / 'CREDITS.md'})")
    _print_models(model, full_precision)
    for name in ("input", "upscaled", "comparison"):
        print(f"written: {folder / name}.png")
    print(
        f"demo: psnr_y bicubic={scores['bicubic']:.2f} full_precision={scores['full precision']:.2f}"
        f" quantized={scores['quantized']:.2f} seconds={seconds:.2f} picture={folder / 'comparison.png'}"
    )
    return 0


def _enlarge(model: str, picture: np.ndarray) -> tuple[np.ndarray, float]:
    """The model's result, 8 bits, and the seconds that the call took (loading not counted)."""
    import torch

    from qartsr_pipeline.cli.loading import load_quietly

    pipeline = load_quietly(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    result = pipeline(picture, upscale=SCALE, output_type="np").images[0]
    return np.rint(result * 255).astype(np.uint8), time.perf_counter() - start


def _print_models(model: str, full_precision: str) -> None:
    from qartsr_pipeline.checkpoint_files import fetch
    from qartsr_pipeline.cli.info import describe, kernels

    print(f"model: {fetch(model)}, compared with {fetch(full_precision)}, on the CPU in float32")
    print(f"kernels: {kernels(describe(fetch(model), 'cpu'))}")


def _bicubic(picture: np.ndarray, factor: float) -> np.ndarray:
    height, width = picture.shape[:2]
    image = Image.fromarray(picture).resize((round(width * factor), round(height * factor)), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"


def _floats(picture: np.ndarray) -> np.ndarray:
    return picture.astype(np.float32) / 255
