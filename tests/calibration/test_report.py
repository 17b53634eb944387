"""The report of a calibration run: complete in itself, and showing what it was given."""

from __future__ import annotations

import base64
import io
import re
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from qartsr_pipeline.calibration.evaluation import EvaluationRow
from qartsr_pipeline.calibration.report.pipeline_folder import model_card
from qartsr_pipeline.calibration.report.report import ReportData, write_report
from qartsr_pipeline.calibration.report.report_plots import running_mean, worst_layers
from qartsr_pipeline.image.comparison_sheet import most_detailed, sheet_around_detail

HOSTILE = '<script>alert("x")</script> & $\\frac{$'
HEADINGS = {
    "facts": "What was run",
    "metrics": "Image quality",
    "pictures": "Images",
    "losses": "Losses",
    "module_losses": "Modules",
    "curve": "Budget",
    "layer_errors": "Error of each layer",
    "bounds": "Bounds",
    "sweep": "Timesteps",
}
pytestmark = pytest.mark.usefixtures("plots")
PLOTS = {"losses.png", "modules.png", "layers.png", "budget.png", "bounds.png", "timesteps.png"}


def everything(name: str = "layer") -> dict:
    """Something for every section, called ``name``."""
    random = np.random.default_rng(0)
    histogram = {"counts": [1, 5, 0, 2], "edges": [-1.0, -0.5, 0.0, 0.5, 1.0], "lower": -0.8, "upper": float("nan")}
    return {
        "facts": {name: name},
        "metrics": [EvaluationRow(name, "model", None, False, 1, {"psnr_y": 28.765, "lpips": 0.25}, {})],
        "pictures": [{name: random.integers(0, 255, (60, 70, 3), np.uint8), "original": np.zeros((60, 70, 3), np.uint8)}],
        "losses": {name: [0.5, float("nan"), 0.25, 0.0, 0.125], "one step": [0.1], "none": []},
        "module_losses": [(name, 0.5, 0.25), ("other", 0.0, 1e-3)],
        "curve": [(4.2, 10.0), (4.5, 3.0), (4.9, 2.5)],
        "layer_errors": {name: 0.0123, "exact": 0.0, "broken": float("inf")},
        "bounds": {name: histogram},
        "sweep": [{"timestep": 100, name: 1.5, "chosen": True}, {"timestep": 999, name: None, "chosen": False}],
    }


class Page(HTMLParser):
    """What a browser would see: headings, text, sources, and whether every element is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.sources, self.headings, self.text, self.scripts = [], set(), [], [], "", 0
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.scripts += tag == "script"
        self.sources += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_one_file_holds_everything(tmp_path):
    index = write_report(tmp_path / "report", ReportData("tiny-fp to W4A4", **everything()))
    html = index.read_text(encoding="utf-8")
    page = Page(html)
    assert index == tmp_path / "report" / "index.html" and set(page.headings) == set(HEADINGS.values())
    assert "tiny-fp to W4A4" in page.text and "28.77" in page.text and "0.0123" in page.text and "LPIPS" in page.text
    files = {path.name for path in index.parent.iterdir()} - {"index.html"}
    assert files == PLOTS | {"pictures-1.png"}
    embedded = [source.split(",") for source in page.sources if source.startswith("data:image/")]
    assert files <= set(page.sources) and len(page.sources) == len(embedded) + len(files)  # the links lead to the files beside it
    plots = {base64.b64decode(content) for kind, content in embedded if "png" in kind}
    assert plots == {(index.parent / name).read_bytes() for name in PLOTS}
    for content in (*plots, (index.parent / "pictures-1.png").read_bytes()):
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert min(picture.shape[:2]) > 100 and picture.std() > 1
    versions = [np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))) for kind, content in embedded if "webp" in kind]
    assert len(versions) == 2 and all(map(np.array_equal, versions, everything()["pictures"][0].values()))
    assert not page.tags & {"link", "iframe"} and not re.search(r"url\(|@import|https?:", html)  # nothing is fetched
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("section", HEADINGS)
def test_a_section_without_data_is_left_out(section, tmp_path):
    page = Page(write_report(tmp_path, ReportData("alone", **{section: everything()[section]})).read_text())
    assert page.headings == [HEADINGS[section]]


def test_names_are_text_whatever_they_hold(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = write_report(tmp_path, ReportData(HOSTILE, **everything(HOSTILE))).read_text(encoding="utf-8")
    page = Page(html)
    assert page.scripts == 1 and page.text.count(HOSTILE) >= 10


def test_without_matplotlib_the_numbers_are_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(write_report(tmp_path, ReportData("numbers", **everything())).read_text())
    assert "Plots need matplotlib" in page.text and "0.0123" in page.text and (tmp_path / "pictures-1.png").is_file()


def test_data_that_do_not_fit_are_named(tmp_path):
    bounds = everything()["bounds"]
    bounds["layer"]["edges"] = [0.0, 1.0]
    with pytest.raises(ValueError, match="layer layer: a histogram of 4 counts has 5 edges, got 2"):
        write_report(tmp_path, ReportData("bounds", bounds=bounds))
    with pytest.raises(ValueError, match="row 2 of the timestep sweep has no entry 'timestep'"):
        write_report(tmp_path, ReportData("sweep", sweep=[{"timestep": 1}, {"step": 2}]))
    pictures = [{"a": np.zeros((20, 20, 3), np.uint8), "b": np.zeros((20, 24, 3), np.uint8)}]
    with pytest.raises(ValueError, match="image 1: all must be uint8 of one shape"):
        write_report(tmp_path, ReportData("pictures", pictures=pictures))
    assert not (tmp_path / "index.html").exists()


def test_the_detail_is_where_the_original_has_some():
    flat, original = np.full((900, 1200, 3), 128, np.uint8), np.full((900, 1200, 3), 128, np.uint8)
    original[700:860, 1000:1160] = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
    left, top, right, bottom = most_detailed(original)
    assert (right - left, bottom - top) == (170, 170) and left <= 1000 and right >= 1160 and top <= 700 and bottom >= 860
    sheet = sheet_around_detail({"bicubic": flat, "original": original})
    assert sheet.shape == (32 + 512 + 8 + 512, 2 * 512 + 8, 3)
    assert sheet[-512:, :512].std() == 0 and sheet[-480:-32, 552:1000].std() > 40


def test_running_mean_leaves_gaps_out():
    values = np.array([1.0, np.nan, 3.0] + [5.0] * 57)
    assert running_mean(values)[:6] == pytest.approx([1.0, 1.0, 2.0, 4.0, 13 / 3, 5.0])  # a window of three
    assert worst_layers({"a": 0.1, "b": float("nan"), "c": 0.3}, 2) == ["b", "c"]


def record(model: str, method: str = "QArtSR") -> dict:
    recipe = {"method": method, "source": "arXiv 2503.05584", "steps": 350, "stages": [{}]}
    return {"model": model, "bits": "w4a4", "seed": 0, "recipe": recipe, "data": {"count": 3}}


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_plain_card_has_no_needless_quotes(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n")
    card = model_card(record("tiny-fp"), tmp_path, "owner/tiny-fp")
    assert card.startswith("---\nlicense: openrail++\nlibrary_name: diffusers\nbase_model: owner/tiny-fp\npipeline_tag:")
    assert "# tiny-fp, W4A4\n\n`tiny-fp`, quantized to W4A4" in card
    assert "Recipe QArtSR (arXiv 2503.05584), 350 steps, seed 0, on 3 photographs." in card


def test_what_people_typed_breaks_neither_the_cards_header_nor_its_text(tmp_path):
    name, hub_id = "a`b` <script> [x](y)\n# big", 'owner/na"me: x\nlicense: mit'
    (tmp_path / "README.md").write_text("---\nlicense: no\n---\n")  # a word that YAML takes for False
    card = model_card(record(name, HOSTILE), tmp_path, hub_id)
    header, text = header_of(card), card.split("---\n", 2)[2]
    assert header["license"] == "no" and header["base_model"] == hub_id.replace("\n", " ") and header["pipeline_tag"]
    assert "<script>" not in text.replace("`a'b' <script> [x](y) # big`", "") and "\n# big" not in text
    assert r"# a\`b\` \<script\> \[x\]\(y\) \# big, W4A4" in text
