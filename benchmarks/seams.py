"""How much does tiling change an image, and can its tile borders be seen? Prints one line per way of tiling.

    python -m benchmarks run seams CHECKPOINT PICTURES --tile-size 256 512 --limit 8 --output FILE.json

Every image is reduced by the model's scale (bicubic), enlarged once as a whole and then in tiles, without colour alignment,
which would hide differences in tone (and once more with it). Columns, averaged over the images, in 8-bit steps (0 to 255):

- ``whole``: mean absolute difference between tiled and untiled, over the whole image; ``max`` the largest; ``PSNR`` in dB.
- ``step``: the tiled image minus the untiled one is smooth where tiles agree and jumps where they do not. Mean absolute jump
  of that difference between the pixels on both sides of a tile border (the middle of an overlap).
- ``elsewhere``: the same jump on all other columns and rows, so what ``step`` would be without tiles.
- ``edge``: mean |step across a border| of the tiled image divided by that of the untiled one there; 1.00 is invisible.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import PIL.Image

from benchmarks.result import Result
from qartsr_pipeline.image.tiles import plan_tiles
from qartsr_pipeline.image_files import READABLE_SUFFIXES
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint")
    parser.add_argument("pictures", type=Path, help="folder of photographs")
    parser.add_argument("--tile-size", type=int, nargs="+", default=[256])
    parser.add_argument("--tile-overlap", type=int, nargs="+", default=[None])
    parser.add_argument("--limit", type=int, default=8, help="number of images")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, help="folder for the tiled images")


@dataclass
class Way:
    """One way of tiling."""

    tile: int
    overlap: int | None
    shared: bool
    color_fix: str | None

    def __str__(self) -> str:
        overlap = "auto" if self.overlap is None else self.overlap
        return f"{self.tile:5d} {overlap!s:>5} {'shared' if self.shared else 'own':>7} {self.color_fix!s:>8}"


def read_reduced(path: Path, scale: int) -> PIL.Image.Image:
    image = PIL.Image.open(path).convert("RGB")
    size = (image.width // scale, image.height // scale)
    return image.resize(size, PIL.Image.Resampling.BICUBIC)


def border_positions(positions: tuple[int, ...], tile: int) -> list[int]:
    """The middle of every overlap: first pixel after the border."""
    return [(a + tile + b) // 2 for a, b in zip(positions, positions[1:], strict=False)]


def jumps(image: np.ndarray, axis: int) -> np.ndarray:
    """Mean absolute difference between neighbouring columns (axis 1) or rows (axis 0), one value per border between them."""
    difference = np.abs(np.diff(image, axis=axis))
    return difference.mean(axis=tuple(a for a in range(3) if a != axis))


def compare_tiled(whole: np.ndarray, tiled: np.ndarray, borders: dict[int, list[int]]) -> dict[str, float]:
    """Both images (H, W, 3) in [0, 255]; `borders`: axis -> positions."""
    difference = tiled - whole
    at, elsewhere, ratio = [], [], []
    for axis, positions in borders.items():
        step, before, after = (jumps(x, axis) for x in (difference, whole, tiled))
        index = np.array([p - 1 for p in positions if p < whole.shape[axis]], dtype=int)
        at += list(step[index])
        elsewhere += list(np.delete(step, index))
        ratio += list(after[index] / before[index].clip(min=1e-6))
    return {
        "whole": float(np.abs(difference).mean()),
        "max": float(np.abs(difference).max()),
        "PSNR": float(10 * np.log10(255**2 / max(np.square(difference).mean(), 1e-10))),
        "step": float(np.mean(at)),
        "elsewhere": float(np.mean(elsewhere)),
        "edge": float(np.mean(ratio)),
    }


def compare(pipe: QArtSRPipeline, path: Path, ways: list[Way], output: Path | None) -> list[dict[str, float]]:
    """One row for every way."""
    low, whole, rows = read_reduced(path, pipe.config.scale), {}, []
    for way in ways:
        if way.color_fix not in whole:
            whole[way.color_fix] = enlarge(pipe, low, tile_size=16384, color_fix=way.color_fix)
        pipe.share_tile_statistics = way.shared
        tiled = enlarge(pipe, low, tile_size=way.tile, tile_overlap=way.overlap, color_fix=way.color_fix)
        size = (low.height * pipe.config.scale, low.width * pipe.config.scale)
        grid = plan_tiles(size, way.tile, way.overlap, pipe.multiple, pipe.vae_scale_factor, automatic=None).grid
        borders = {0: border_positions(grid.tops, grid.tile_height), 1: border_positions(grid.lefts, grid.tile_width)}
        rows.append(compare_tiled(whole[way.color_fix], tiled, borders))
        if output is not None:
            name = f"{path.stem}_{way.tile}_{'shared' if way.shared else 'own'}_{way.color_fix}.png"
            PIL.Image.fromarray(tiled.clip(0, 255).round().astype(np.uint8)).save(output / name)
    return rows


def enlarge(pipe: QArtSRPipeline, low: PIL.Image.Image, **arguments: object) -> np.ndarray:
    """(H, W, 3) in [0, 255]."""
    return pipe(low, upscale=pipe.config.scale, output_type="np", **arguments).images[0].astype(np.float64) * 255


def measure(args: argparse.Namespace) -> Result:
    """A row for every way of tiling: means over the images."""
    pipe = QArtSRPipeline.from_pretrained(args.checkpoint).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for path in args.pictures.iterdir() if path.suffix.lower() in READABLE_SUFFIXES)[: args.limit]
    if not paths:
        raise ValueError(f"{args.pictures} has no images")
    ways = [
        Way(tile, overlap, shared, color_fix)
        for tile in args.tile_size
        for overlap in args.tile_overlap
        for shared, color_fix in ((False, None), (True, None), (True, "wavelet"))
    ]
    found = [compare(pipe, path, ways, args.save) for path in paths]
    means = ({name: float(np.mean([row[name] for row in rows])) for name in rows[0]} for rows in zip(*found, strict=True))
    rows = [asdict(way) | values for way, values in zip(ways, means, strict=True)]
    return Result("seams", {"checkpoint": args.checkpoint, "images": [path.name for path in paths]}, rows)


def table(result: Result) -> str:
    """One line for every way of tiling."""
    ways = [field.name for field in fields(Way)]
    names = [name for name in result.rows[0] if name not in ways]
    lines = [
        f"{Way(**{name: row[name] for name in ways})} " + " ".join(f"{row[name]:9.3f}" for name in names) for row in result.rows
    ]
    title = f"{len(result.settings['images'])} images\n tile overlap  norms    color "
    return "\n".join([title + " ".join(f"{name:>9}" for name in names), *lines])
