"""Training pairs: a degraded image, and what another upscaler made of it as the target.

A folder holds for every pair NAME_low.png (h x w) and NAME_peer.png (4h x 4w); `calibration.teacher.make_pairs` writes one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from qartsr_pipeline.calibration.data import SCALE
from qartsr_pipeline.calibration.data.pairs import MARGIN, Pair
from qartsr_pipeline.calibration.data.patches import read_photograph
from qartsr_pipeline.image.resize import resize


class DistilledPairs:
    """All pairs of a folder, held in memory.

    Raises:
        FileNotFoundError: no pair there. ValueError: a partner is missing or of another size.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        lows = sorted(folder.glob("*_low.png"))
        if not lows:
            raise FileNotFoundError(
                f"no *_low.png in {str(folder)!r}: write pairs with calibration.teacher.make_pairs, or leave out --distilled"
            )
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for path in lows:
            partner = path.with_name(path.name.removesuffix("_low.png") + "_peer.png")
            if not partner.is_file():
                raise ValueError(f"{path} has no partner {partner.name}: make it again, or remove it")
            low, peer = read_photograph(path), read_photograph(partner)
            if peer.shape[:2] != tuple(SCALE * side for side in low.shape[:2]):
                raise ValueError(f"{partner} is not {SCALE} times as large as {path.name}: make it again, or remove both")
            self.pairs.append((low, peer))

    def sample(self, count: int, side: int, rng: np.random.Generator) -> Pair:
        """``count`` random crops, flipped and turned, as (bicubic enlargement, peer's output), (count, 3, side, side) in [-1, 1].

        Raises:
            ValueError: the pairs are smaller than the crops with their margins.
        """
        part = (side + 2 * MARGIN) // SCALE
        lows: list[np.ndarray] = []
        peers: list[np.ndarray] = []
        for index in rng.integers(len(self.pairs), size=count):
            low, peer = self.pairs[index]
            spare = np.array(low.shape[:2]) - part
            if spare.min() < 0:
                needed = f"patches of {side} need inputs of {part} x {part} pixels"
                raise ValueError(f"{needed}, the pairs have {low.shape[1]} x {low.shape[0]}: use smaller patches or larger pairs")
            top, left = (int(rng.integers(number + 1)) for number in spare)
            turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
            for found, image, factor in ((lows, low, 1), (peers, peer, SCALE)):
                rows, columns = (slice(start * factor, (start + part) * factor) for start in (top, left))
                crop = np.rot90(image[rows, columns], turns)
                found.append(crop[:, ::-1] if mirrored else crop)
        low, peer = (_tensor(found) for found in (lows, peers))
        up = resize(low, (peer.shape[-2], peer.shape[-1]))
        cut = slice(MARGIN, -MARGIN)
        up, peer = ((x[..., cut, cut] * 2 - 1).contiguous(memory_format=torch.channels_last) for x in (up, peer))
        return up, peer


def _tensor(images: list[np.ndarray]) -> torch.Tensor:
    """(B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
