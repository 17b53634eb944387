"""The image files of a folder, and what else is in it: nothing is left out without a word."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from qartsr_pipeline.image_files.reading import READABLE_SUFFIXES

_HEIF = {".heic", ".heif", ".hif"}


@dataclass
class Listing:
    """A folder's images, sorted by folder and name, and what else was found.

    Attributes:
        images: paths that begin with the folder's.
        others: files of other kinds, by their suffix in lower case.
        hidden: names of files and folders that begin with a dot: macOS puts `._photo.jpg` beside photo.jpg.
        folders: names of folders that were not searched.
        unreadable: folders that could not be searched, with the reason.
    """

    folder: Path
    images: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    hidden: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def left_out(self, way: str = "") -> str | None:
        """One sentence about everything that is no image; None if there is nothing.

        Args:
            way: how the folders that were not searched can be.
        """
        parts = []
        count = sum(self.others.values())
        if count:
            kinds = ", ".join(f"{number} {suffix or 'without suffix'}" for suffix, number in sorted(self.others.items()))
            parts.append(f"{_many(count, 'file')} of other kinds ({kinds})")
        if _HEIF & set(self.others):
            parts[-1] += "; pip install 'qartsr[heif]' to read .heic"
        if self.hidden:
            parts.append(f"{_many(len(self.hidden), 'hidden entry', 'hidden entries')} ({_names(self.hidden)})")
        if self.folders:
            parts.append(f"{_many(len(self.folders), 'folder')} ({_names(self.folders)}{way})")
        parts += [f"the folder {reason}" for reason in self.unreadable]
        return f"{self.folder}: left out: {'; '.join(parts)}." if parts else None


def list_images(folder: Path, recursive: bool = False, apart_from: Path | None = None) -> Listing:
    """Looks through a folder.

    Args:
        recursive: search the folders within it, too; links to folders are not followed.
        apart_from: a folder within it that is passed over: that of the results.

    Raises:
        OSError: the folder cannot be searched.
    """
    listing = Listing(folder)
    for entry in _entries(folder, listing, recursive, apart_from and apart_from.resolve()):
        suffix = Path(entry.name).suffix.lower()
        if suffix in READABLE_SUFFIXES and entry.is_file():
            listing.images.append(Path(entry.path))
        else:
            listing.others[suffix] += 1
    return listing


def _entries(folder: Path, listing: Listing, recursive: bool, apart_from: Path | None) -> Iterator[os.DirEntry[str]]:
    """The files below a folder; hidden entries and folders that are not searched are noted in `listing`."""
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    inner = []
    for entry in entries:
        if entry.name.startswith("."):
            listing.hidden.append(entry.name)
        elif not entry.is_dir():
            yield entry
        elif not (recursive and not entry.is_symlink()):
            listing.folders.append(entry.name)
        elif apart_from is None or Path(entry.path).resolve() != apart_from:
            inner.append(Path(entry.path))
    for path in inner:
        try:
            yield from _entries(path, listing, recursive, apart_from)
        except OSError as error:
            listing.unreadable.append(f"{path} ({error.strerror or error})")


def _many(count: int, one: str, several: str | None = None) -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"


def _names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
