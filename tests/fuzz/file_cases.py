"""Mutated image files through `qartsr upscale`: each is written whole or named, and nothing is left over."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import zlib
from functools import cache
from pathlib import Path

import numpy as np
from folder_cases import templates
from judging import Failure, judge_image
from PIL import Image

from qartsr_pipeline.cli.main import main

# These have checksums of their pixels: a damaged byte in them has to be noticed.
PNGS = ("rgb.png", "rgba.png", "grey.png", "grey16.png", "palette.png")
FORMATS = (*PNGS, "exif.jpg", "cmyk.jpg", "lzw.tif", "plain.tif", "x.webp", "x.bmp")


@cache
def originals(place: Path) -> dict[str, tuple[bytes, np.ndarray]]:
    """The bytes of a sound file of each kind, and the pixels of its enlargement."""
    sources, results = place / "sources", place / "results"
    sources.mkdir()
    pixels = np.random.RandomState(1).randint(0, 255, (6, 8, 4)).astype("uint8")
    rgb = Image.fromarray(pixels[..., :3])
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photograph"
    Image.fromarray(pixels).save(sources / "rgba.png")
    Image.fromarray(pixels[..., 0].astype("uint16") * 257).save(sources / "grey16.png")
    rgb.convert("L").save(sources / "grey.png")
    rgb.convert("P").save(sources / "palette.png", transparency=3)
    rgb.save(sources / "exif.jpg", exif=exif, icc_profile=b"\0" * 128)
    rgb.convert("CMYK").save(sources / "cmyk.jpg")
    rgb.save(sources / "lzw.tif", compression="tiff_lzw")
    for name in ("rgb.png", "plain.tif", "x.webp", "x.bmp"):
        rgb.save(sources / name)
    for name in FORMATS:  # one by one: names that differ in their ending only would meet
        code, said = upscale(place, sources / name, results / name)
        if code:
            raise Failure(f"the sound file {name} is refused: {said}")
    return {name: ((sources / name).read_bytes(), read(next((results / name).iterdir()))) for name in FORMATS}


def upscale(place: Path, source: Path, output: Path) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        model = templates(place)["fp"].folder
        try:
            code = main(["upscale", str(source), "-o", f"{output}{os.sep}", "--model", str(model), "--device", "cpu"])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, said.getvalue()


def read(path: Path) -> np.ndarray:
    with open(path, "rb") as file, Image.open(file) as image:
        image.load()
        return np.asarray(image)


def mutated(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    done = rng.choice(["bit", "bit", "bytes", "cut", "empty", "zeros", "random", "tail", "middle", "header", "sound"])
    place = rng.randrange(len(content))
    changed = bytearray(content)
    if done == "bit":
        changed[place] ^= 1 << rng.randrange(8)
    elif done == "bytes":
        for _ in range(rng.randrange(2, 30)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif done == "header":
        changed[rng.randrange(min(64, len(changed)))] = rng.randrange(256)
    elif done == "tail":
        changed += rng.randbytes(50)
    elif done == "middle":
        changed[place:place] = rng.randbytes(rng.randrange(1, 40))
    other = {"cut": content[:place], "empty": b"", "zeros": bytes(len(content)), "random": rng.randbytes(len(content))}
    return f"{done} at {place}", other.get(done, bytes(changed))


def is_large(content: bytes) -> bool:
    """Whether Pillow would read more than a thousand pixels."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.width * image.height > 1_000
    except Exception:  # no image at all, which is the point of a mutation
        return False


def has_wrong_sums(content: bytes) -> bool:
    """Whether a PNG's chunks, up to its end, are not all whole and as their CRC-32 says."""
    position = 8
    while position + 12 <= len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        chunk, stored = content[position + 4 : position + 8 + length], content[position + 8 + length : position + 12 + length]
        if len(stored) < 4 or zlib.crc32(chunk) != int.from_bytes(stored, "big"):
            return True
        if chunk[:4] == b"IEND":
            return False
        position += 12 + length
    return True


def run_case(rng: random.Random, place: Path) -> str:
    """A few files in one folder, enlarged by one command; returns a description, raises Failure with it."""
    known = originals(place)
    source, output = place / "in", place / "out"
    for folder in (source, output):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir()
    said, contents = [], {}
    for name in rng.sample(FORMATS, 3):
        done, content = mutated(rng, known[name][0])
        if is_large(content):  # a header that claims another size may be believed, and enlarging that takes its time
            done, content = "sound", known[name][0]
        file = f"{len(said)}-{name}"
        if rng.random() < 0.15:
            file = f"{len(said)}{Path(rng.choice(FORMATS)).suffix}"  # an ending that says another format
        (source / file).write_bytes(content)
        contents[file] = name, content
        said.append(f"{file} ({name}): {done}")
    odd = rng.choice(["", "", "pipe", "folder", "link", "text"])
    if odd == "pipe":
        os.mkfifo(source / "pipe.png")
    elif odd == "folder":
        (source / "folder.png").mkdir()
    elif odd == "link":
        (source / "link.png").symlink_to("nowhere")
    elif odd == "text":
        (source / "notes.txt").write_text("not an image")
    description = f"{'; '.join(said)}; {odd}"
    code, printed = upscale(place, source, output)
    try:
        _judge(source, output, contents, known, code, printed)
    except Failure as failure:
        raise Failure(f"{description}: {failure}") from failure
    return description


def _judge(
    source: Path,
    output: Path,
    contents: dict[str, tuple[str, bytes]],
    known: dict[str, tuple[bytes, np.ndarray]],
    code: int,
    printed: str,
) -> None:
    if code not in (0, 2):
        raise Failure(f"exit code {code}: {printed[-300:]}")
    if "Traceback" in printed:
        raise Failure(f"a traceback: {printed[-500:]}")
    written = sorted(output.rglob("*")) if output.exists() else []
    for path in written:
        if path.is_file() and not any(path.stem.startswith(Path(name).stem) for name in contents):
            raise Failure(f"{path.name} was left over")
    for name, (original, content) in contents.items():
        results = [path for path in written if path.stem.startswith(Path(name).stem)]
        lines = [line for line in printed.splitlines() if name in line]
        if not results:
            if not lines:
                raise Failure(f"{name} was left out without a word: {printed[-300:]}")
            continue
        try:
            found = read(results[0])
        except Exception as error:
            raise Failure(f"{results[0].name} cannot be read: {error}") from error
        is_png = content[:8] == b"\x89PNG\r\n\x1a\n"
        if original in PNGS and is_png and has_wrong_sums(content):
            warned = any("note:" in line or "warning" in line for line in lines)
            if not warned:
                judge_image(found, known[original][1], 0.0)
