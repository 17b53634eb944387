"""What a model is trained and validated on, from a description of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qartsr_pipeline.calibration.data.dead_leaves import DeadLeaves
from qartsr_pipeline.calibration.data.fingerprint import photographs_record
from qartsr_pipeline.calibration.data.pairs import Pair, choose_held_out, held_out_pairs, procedural_pairs
from qartsr_pipeline.calibration.data.patches import (
    ImagePatches,
    MemoryImage,
    MixedPatches,
    Patches,
    PhotographPatches,
    images_record,
    pixels_of,
)
from qartsr_pipeline.calibration.data.photographs import list_photographs

Item = TypeVar("Item")


@dataclass(frozen=True)
class TrainingSet:
    """Images to train on and to validate on.

    Attributes:
        patches: the source of training patches.
        held_out: pairs that nothing is trained on.
        record: what a model's record says of them, as JSON knows it: "data" and "held_out".
    """

    patches: Patches
    held_out: list[Pair]
    record: dict[str, Any]


@dataclass(frozen=True)
class TrainingData:
    """Which images, and how they are used.

    Attributes:
        data: a folder of photographs, or images in memory; None for procedural images alone.
        procedural: share of procedural images, 0 to 1; with ``data`` None it is taken as 1.
        degradation: of the held-out images, a name in `DEGRADATIONS`.
        held_out: how many images are kept for validation.
    """

    data: str | Path | Sequence[MemoryImage] | None = None
    procedural: float = 0.0
    degradation: str = "bicubic"
    held_out: int = 8

    def load(self) -> TrainingSet:
        """Reads the images.

        Raises:
            FileNotFoundError: no such folder, or no image in it. ImageFileError: a photograph cannot be read.
            ValueError: an image is too small to validate on, or all of them are held out.
        """
        if self.data is None:
            leaves = DeadLeaves()
            pairs = procedural_pairs(leaves, self.held_out, self.degradation)
            return TrainingSet(leaves, pairs, {"data": None, "held_out": []})
        if isinstance(self.data, (str, Path)):
            paths = list_photographs(self.data)
            held, rest = self._split(paths)
            patches = self._mixed(lambda: PhotographPatches(rest))
            record = {"data": photographs_record(paths), "held_out": [path.name for path in held]}
            return TrainingSet(patches, held_out_pairs(held, self.degradation), record)
        images = pixels_of(self.data)
        numbers, others = self._split(range(len(images)))
        patches = self._mixed(lambda: ImagePatches([images[number] for number in others]))
        pairs = held_out_pairs([images[number] for number in numbers], self.degradation)
        return TrainingSet(patches, pairs, {"data": images_record(images), "held_out": numbers})

    def _split(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """Those held out, and the rest."""
        held = choose_held_out(items, self.held_out)
        rest = [item for item in items if item not in held]
        if not rest and self.procedural < 1:
            raise ValueError(f"all {len(items)} images are kept for validation: give more images, or hold out fewer")
        return held, rest

    def _mixed(self, own: Callable[[], Patches]) -> Patches:
        """The images' own patches with the share of procedural ones."""
        if self.procedural == 1:
            return DeadLeaves()
        return MixedPatches(own(), DeadLeaves(), self.procedural) if self.procedural > 0 else own()
