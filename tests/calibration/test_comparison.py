"""`compare` and `qartsr compare`: what stands on the page, and what is refused before anything is computed."""

from __future__ import annotations

import base64
import doctest
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from qartsr_pipeline.calibration.evaluation import compare, comparison
from qartsr_pipeline.calibration.evaluation.comparison import _displayed, find_output
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.image_files import ImageFile, Metadata


def image(path: Path, width: int = 9, height: int = 7, seed: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def photo(tmp_path):
    return image(tmp_path / "photo.png")


def test_the_example_runs():
    failures, examples = doctest.testmod(comparison)
    assert examples and not failures


def versions(page: Path) -> dict[str, np.ndarray]:
    """Name -> pixels, of a page of one photograph."""
    found = re.findall(r'base64,([^"]+)".*?<strong>(.*?)</strong>', page.read_text(encoding="utf-8"))
    return {name: np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content, name in found}


def test_the_page_shows_bicubic_models_and_what_others_made(tiny_pipeline, tiny_folder, photo, tmp_path):
    other = np.asarray(Image.open(image(tmp_path / "others" / "photo_x4.png", 36, 28, seed=1)))
    steps = []
    written = compare(
        photo,
        {"memory": tiny_pipeline, "folder": tiny_folder},
        tmp_path / "page.html",
        outputs={"other": tmp_path / "others", "same": tmp_path / "others" / "photo_x4.png"},
        progress=lambda *step: steps.append(step),
    )
    shown = versions(written.path)
    assert list(shown) == ["bicubic", "memory", "folder", "other", "same"]
    source = Image.open(photo)
    assert np.array_equal(shown["bicubic"], np.asarray(source.resize((36, 28), Image.Resampling.BICUBIC)))
    made = np.rint(tiny_pipeline(source, output_type="np").images[0] * 255).astype(np.uint8)
    assert np.array_equal(shown["memory"], made) and np.array_equal(shown["folder"], made)
    assert np.array_equal(shown["other"], other) and np.array_equal(shown["same"], other)
    assert steps == [("memory", 1, 2), ("folder", 2, 2)] and written.size == written.path.stat().st_size
    text = written.path.read_text(encoding="utf-8")
    assert f"36 × 28, {written.seconds['memory'][0]:.2f} s" in text and "9 × 7, enlarged 4 times" in text


def test_several_photographs_at_another_scale_and_nothing_but_outputs(tmp_path):
    photographs = [image(tmp_path / name / "photo.png", seed=number) for number, name in enumerate("ab")]
    for number, path in enumerate(photographs):
        image(path.with_name("photo_x2.png"), 18, 14, seed=number)
    (tmp_path / "b" / "photo.png").rename(tmp_path / "b" / "second.png")
    (tmp_path / "b" / "photo_x2.png").rename(tmp_path / "a" / "second_out.png")
    photographs[1] = tmp_path / "b" / "second.png"
    written = compare(photographs, [], tmp_path / "page.html", outputs={"other": tmp_path / "a"}, upscale=2)
    text = written.path.read_text(encoding="utf-8")
    assert text.count("<figure") == 2 and text.count("18 × 14") == 4 and not written.seconds


def test_what_a_browser_shows_is_eight_bits_in_srgb_over_white():
    deep = np.full((2, 2, 4), 65535, np.uint16)
    deep[0, 0] = (257 * 10, 257 * 20, 257 * 30, 65535)
    deep[1, 1] = (0, 0, 0, 0)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (None, srgb, b"damaged"):
        shown = _displayed(ImageFile(deep, Metadata(icc_profile=profile)))
        assert shown.shape == (2, 2, 3) and shown[0, 0].tolist() == [10, 20, 30] and shown[1, 1].tolist() == [255] * 3
    grey = _displayed(ImageFile(np.array([[[7], [8]]], np.uint8)))
    assert grey.tolist() == [[[7] * 3, [8] * 3]]


def test_the_file_of_another_program_is_found_or_named(photo, tmp_path):
    folder = tmp_path / "outputs"
    image(folder / "photo_1.png"), image(folder / "photo_out.jpg")
    assert find_output(folder, photo, 4) == folder / "photo_out.jpg"
    image(folder / "photo.png")
    with pytest.raises(ValueError, match=r"several images of photo.png: photo.png, photo_out.jpg"):
        find_output(folder, photo, 4)
    with pytest.raises(FileNotFoundError, match="none is called photo or photo_x4 or photox4 or photo_out. Rename it"):
        find_output(tmp_path, photo, 4)  # not the photograph itself


def test_the_command_writes_the_page_and_says_how_large_it_is(tiny_folder, photo, tmp_path, capsys):
    page = tmp_path / "page.html"
    command = ["compare", str(photo), "--models", str(tiny_folder), "--device", "cpu", "--scale", "2", "-o", str(page)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert re.search(r"^tiny: \d+\.\d\d s$", said, re.M) and f"written: {page} (0.0 MB, 1 x 2 images)" in said
    assert list(versions(page)) == ["bicubic", "tiny"] and versions(page)["tiny"].shape == (14, 18, 3)
    before = page.read_bytes()
    assert main(command) == 2 and page.read_bytes() == before
    assert "page.html exists already. Add --overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none.png"], "There is no file none.png"),
        (["text.png"], "text.png is not an image"),
        (["photo.png", "./photo.png"], "photo.png is given twice"),
        (["photo.png", "--models", "tiny-w9a9"], "There is no folder 'tiny-w9a9'"),
        (["photo.png", "--models", "tiny", "tiny"], "a model is given twice"),
        (["photo.png", "--outputs", "bicubic=large.png"], "several versions would be called bicubic"),
        (["photo.png", "--outputs", "a=large.png", "--outputs", "a=large.png"], "a name is given twice"),
        (
            ["photo.png", "--outputs", "other=photo.png"],
            "outputs other: photo.png has 9 x 7 pixels, but photo.png enlarged",
        ),
        (["photo.png", "--outputs", "other=none.png"], "outputs other: There is no file or folder none.png"),
        (["photo.png", "--outputs", "other=empty"], "outputs other: The folder empty has no image of photo.png"),
        (["photo.png", "large.png", "--outputs", "other=large.png"], "large.png is one image, but there are 2 photographs"),
        (["photo.png", "--scale", "0"], "must be above 0 and at most 16"),
        (["huge.png", "--scale", "16"], "huge.png: its versions would have 8000 x 8000 pixels"),
        (["photo.png", "-o", "page.png"], "page.png does not end in .html"),
        (
            ["photo.png", "-o", "none/page.html"],
            "page.html cannot be written: No such file or directory",
        ),
        (
            ["photo.png", "-o", "folder.html"],
            "folder.html cannot be written: Is a directory. That is a folder: choose another",
        ),
        (["photo.png", "--device", "cuda:7"], "has no such device here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(photo, tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    image(tmp_path / "large.png", 36, 28)
    Image.new("L", (500, 500)).save(tmp_path / "huge.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error and error.count("qartsr: error: ") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_without_a_path_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["compare", "photo.png", "--outputs", "real-esrgan"])
    assert caught.value.code == 2 and "must be NAME=FOLDER or NAME=FILE, but is 'real-esrgan'" in capsys.readouterr().err


def test_what_is_made_of_a_grey_photograph_is_grey_when_its_profile_is_applied(monkeypatch):
    shown = []
    monkeypatch.setattr(comparison, "_displayed", lambda file: shown.append(file.pixels.shape[2]))
    for channels in (1, 2, 3, 4):
        result = np.zeros((8, 8, 4 if channels in (2, 4) else 3))
        answer = ([result],)
        comparison._enlarged(lambda *given, **options: answer, ImageFile(np.zeros((2, 2, channels), np.uint8)), 4, None)  # noqa: B023
    assert shown == [1, 2, 3, 4]
