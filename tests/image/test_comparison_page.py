"""The page with a slider: complete in itself, whatever the images are called, and refused where no browser could show it."""

from __future__ import annotations

import base64
import doctest
import io
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qartsr_pipeline.image import comparison_page as module
from qartsr_pipeline.image.comparison_page import Comparison, NamedImage, comparison_page, encoded

HOSTILE = '</script><script>alert("x")</script> & \' <img src=x>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def noise(seed: int, height: int = 12, width: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def two(title: str = "photo", first: str = "first", second: str = "second") -> Comparison:
    return Comparison(title, [NamedImage(first, noise(0), "0.50 s"), NamedImage(second, noise(1))])


def embedded(page: bytes) -> list[np.ndarray]:
    """The images of a page."""
    contents = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page.decode())
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for content in contents]


def test_the_example_runs():
    failures, examples = doctest.testmod(module)
    assert examples and not failures


@pytest.mark.parametrize("webp", [True, False])
def test_the_page_holds_every_image_without_loss_and_fetches_nothing(webp, monkeypatch):
    if not webp:
        monkeypatch.setattr(module.features, "check", lambda name: False)
    page = comparison_page("Two", [two("a"), two("b")], "On a CPU.")
    assert all(map(np.array_equal, embedded(page), [noise(0), noise(1)] * 2)) and len(embedded(page)) == 4
    text = page.decode()
    assert (b"image/webp" in page) == webp and (b"image/png" in page) == (not webp)
    assert "20 × 12, 0.50 s" in text and "<p>On a CPU.</p>" in text and text.count("<script>") == 1
    assert not re.search(r"https?:|url\(|@import|<link|<iframe", text) and "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and 'lang="en"' in text and text.count('alt="') == 4


def test_names_are_text_whatever_they_hold():
    text = comparison_page(HOSTILE, [two(HOSTILE, HOSTILE + "1", HOSTILE + "2")], HOSTILE).decode()
    assert text.count("<script") == 1 and text.count("</script") == 1 and "<img src=x" not in text


def test_the_images_shown_first_can_be_chosen():
    comparison = Comparison("three", [NamedImage(str(number), noise(number)) for number in range(3)], left=-2, right=0)
    assert 'data-left="1" data-right="0"' in comparison_page("", [comparison]).decode()


def test_an_image_too_long_for_webp_becomes_a_png():
    content, kind = encoded(np.zeros((1, 16400, 3), np.uint8))
    assert kind == "png" and Image.open(io.BytesIO(content)).size == (16400, 1)


@pytest.mark.parametrize(
    ("comparisons", "expected"),
    [
        ([], "nothing to compare"),
        ([Comparison("photo", [NamedImage("a", noise(0))])], "photo: a comparison takes at least two images, got 1"),
        ([two(first="same", second="same")], "photo: two versions have the same name"),
        (
            [Comparison("photo", [NamedImage("a", noise(0)), NamedImage("b", noise(0, 13))])],
            "all must be uint8 of one shape",
        ),
        ([Comparison("photo", [NamedImage("a", noise(0) / 255), NamedImage("b", noise(0) / 255)])], "must be uint8"),
    ],
)
def test_what_cannot_be_compared_is_named(comparisons, expected):
    with pytest.raises(ValueError, match=expected):
        comparison_page("", comparisons)


def test_pages_that_no_browser_could_show_are_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"scan.png: its versions would have 9000 x 8000 pixels.* 40 million. Cut the part"):
        module.check_page_size([("scan.png", (8000, 9000), 2)])
    with pytest.raises(ValueError, match=r"would hold 40 images with 400 million pixels.* Compare fewer"):
        module.check_page_size([("a", (2500, 4000), 20), ("b", (2500, 4000), 20)])
    monkeypatch.setattr(module, "MOST_IMAGE_PIXELS", 12 * 20 - 1)
    with pytest.raises(ValueError, match="photo: its versions would have 20 x 12 pixels"):
        comparison_page("", [two()])


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
def test_the_script_is_valid():
    subprocess.run(["node", "--check", Path(module.__file__).with_suffix(".js")], check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_makes_a_slider_of_every_comparison(tmp_path):
    page = tmp_path / "page.html"
    large = Comparison("large", [NamedImage(HOSTILE, noise(0, 40, 3000)), NamedImage("second", noise(1, 40, 3000))])
    page.write_bytes(comparison_page("Two", [two("a"), large]))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert shown.count('role="slider"') == 2 and shown.count("<select") == 4 and shown.count("<option") == 8
    assert shown.count('aria-valuetext="50 % first, 50 % second"') == 1 and "<ol>" not in shown
    zoom, reduced = re.findall(r"<output>(\d+) %</output>", shown)
    assert zoom == "100" and 10 < int(reduced) < 50  # an image wider than the window is shown whole
    assert len(re.findall("<img [^>]*translate", shown)) == 4
