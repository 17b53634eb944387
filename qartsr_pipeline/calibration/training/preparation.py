"""How far a calibration has come before its first step: the model is observed, ranks are chosen, layers are set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Preparation:
    """Who is told.

    Attributes:
        told: called with what is being done, how much of it is done, and how much there is: before the first part and after every
            one. What it raises ends the calibration.
        shown: whether bars are drawn.
    """

    told: Told | None = None
    shown: bool = True

    def follow(self, items: Collection[Item], doing: str, unit: str) -> Iterator[Item]:
        """The items, one after another."""
        told = self.told or (lambda *_: None)
        told(doing, 0, len(items))
        with tqdm(items, desc=doing, unit=unit, leave=False, disable=not self.shown) as bar:
            for number, item in enumerate(bar):
                yield item
                told(doing, number + 1, len(items))


QUIET = Preparation(shown=False)
