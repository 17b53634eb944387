"""What `qartsr evaluate` does once its arguments are parsed: measures, and writes a report, sheets of images and a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from tqdm import tqdm

from qartsr_pipeline.calibration.data.fingerprint import data_fingerprint, hardware, recorded_files, versions
from qartsr_pipeline.calibration.data.patches import as_pixels, list_photographs
from qartsr_pipeline.calibration.evaluation.api import evaluate, row_names
from qartsr_pipeline.calibration.evaluation.measurement import ImageOutputs
from qartsr_pipeline.calibration.evaluation.metrics import BUILT_IN
from qartsr_pipeline.calibration.evaluation.originals import HR_ONLY, ImagePair, find_pairs
from qartsr_pipeline.calibration.evaluation.peers import RealEsrgan, Upscaler, lanczos
from qartsr_pipeline.calibration.evaluation.reported_results import reproduce
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow, markdown
from qartsr_pipeline.calibration.start.warm_start import record_of_folder
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.cli.messages import UsageError
from qartsr_pipeline.image.comparison_page import MOST_IMAGE_PIXELS, Comparison, NamedImage, comparison_page
from qartsr_pipeline.image.comparison_sheet import comparison_sheet
from qartsr_pipeline.image_files import ImageFile, write_image
from qartsr_pipeline.whole_files import make_folder, write_whole

PAGE_NAME = "compare.html"
PAGE_PIXELS = 24_000_000  # about 35 MB: 15 photographs of 512 x 512 in six versions
NO_GROUND_TRUTH = "no ground truth"  # beside the layouts of `find_pairs`


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see `qartsr_pipeline.cli.evaluate.add_parser`."""

    models: list[str]
    data: Path
    clips: bool
    frames: int | None
    color_fix: str | None
    degradation: str
    no_color_fix: bool
    tile_size: int | None
    limit: int | None
    bypass: bool
    metrics: list[str]
    output: Path | None
    pictures: Path | None
    device: str
    dtype: str
    no_ground_truth: bool
    backbones: Path | None
    lanczos: bool
    outputs: list[tuple[str, str]]
    realesrgan: Path | None

    def peers(self) -> dict[str, Upscaler | str]:
        """Name of a row -> upscaler or folder; raises UsageError for a name that is given twice."""
        found: dict[str, Upscaler | str] = {"lanczos": lanczos} if self.lanczos else {}
        if self.realesrgan:
            found["Real-ESRGAN"] = RealEsrgan(self.realesrgan / "realesrgan-x4plus")
        for name, folder in self.outputs:
            if name in found:
                raise UsageError(f"--outputs {name}: there are two rows of that name")
            found[name] = folder
        return found


Measure: TypeAlias = Callable[[Request], tuple[list[EvaluationRow], dict[str, Any]]]  # the rows, and the report for JSON


def compare_with_papers(reports: list[str]) -> None:
    """Prints what the papers report, beside the reports in these files."""
    print(reproduce([read_report(path) for path in reports]))


def evaluate_and_write(request: Request, measure: Measure) -> None:
    """Measures, prints the table, and writes what is asked for."""
    if request.output:
        check_output(request.output)
    try:
        rows, report = measure(request)
    except ImportError as error:  # of a metric's or peer's package; the message says how to install it
        raise UsageError(str(error)) from error
    table = markdown(rows)
    if request.output:
        write_report(request.output, report, report_text(report, table, request.pictures, request.output.parent))
    print(report_text(report, table), end="")
    for written in filter(None, (request.output, request.output and request.output.with_suffix(".md"), request.pictures)):
        print(f"\nwritten: {written}")


def measure_images(request: Request) -> tuple[list[EvaluationRow], dict[str, Any]]:
    """Runs the evaluation with a progress bar; the rows, and the report that is written as JSON."""
    if request.frames is not None:
        raise UsageError(f"--frames is for clips, but {request.data} is measured as images: leave it out, or add --clips")
    device, _ = choose_device(request.device)
    peers = request.peers()
    if request.no_ground_truth:
        layout, pairs = NO_GROUND_TRUTH, [ImagePair(path) for path in list_photographs(request.data)]
    else:
        layout, pairs = find_pairs(request.data)
    pairs = pairs[: request.limit]
    originals, files = [pair.high for pair in pairs], [path for pair in pairs for path in pair.files]
    names = row_names(request.models)
    checkpoints = {names[model]: fetch(model) for model in request.models}
    if request.pictures:
        make_folder(request.pictures)
    page = FirstImages()
    with tqdm(unit="image", mininterval=1) as bar:

        def show(label: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix_str(Path(label).name, refresh=False)
            bar.update(done - bar.n)

        def keep(image: ImageOutputs) -> None:
            if request.pictures:
                write_comparison(comparison_path(request.pictures, request.data, Path(image.label)), image)
                page.add(image)

        rows = evaluate(
            checkpoints,
            pairs,
            metrics=list(dict.fromkeys([*BUILT_IN, *request.metrics])),
            degradation=request.degradation,
            color_fixes=[None] if request.no_color_fix else [request.color_fix or "wavelet", None],
            tile_size=request.tile_size,
            bypass=request.bypass,
            device=device,
            dtype=getattr(torch, request.dtype),
            ground_truth=not request.no_ground_truth,
            peers=peers,
            backbones=request.backbones,
            progress=show,
            on_image=keep,
        )
    if request.pictures and page.comparisons:
        write_whole(request.pictures / PAGE_NAME, page.content(request.data.resolve().name))
    comparisons = [comparison_path(request.pictures, request.data, path).name for path in originals] if request.pictures else []
    return rows, {
        "data": {
            "folder": request.data.resolve().name,
            "layout": layout,
            **data_fingerprint(files),
            "count": len(pairs),
            "pictures": [path.name for path in originals],
            "comparisons": comparisons,
            "page": PAGE_NAME if request.pictures and page.comparisons else None,
            "unseen_by_record": {name: recorded_files(checkpoint) is not None for name, checkpoint in checkpoints.items()},
        },
        "made_by": {name: made_by(checkpoint) for name, checkpoint in checkpoints.items()},
        "settings": {
            "scale": 4,
            "degradation": low_resolution(layout, request.degradation),
            "ground_truth": not request.no_ground_truth,
            "peers": list(peers),
            "border": 4,
            "tile_size": request.tile_size,
            "dtype": request.dtype,
        },
        "hardware": hardware(device),
        "versions": versions(),
        "rows": [row.to_json() for row in rows],
    }


def made_by(folder: Path) -> dict[str, str]:
    """Method and bits that a folder's record names, as "method" and "bits"; nothing where it is not of this program's kind."""
    record = record_of_folder(folder)
    method = record["recipe"].get("method") if isinstance(record.get("recipe"), dict) else None
    bits = record.get("bits")
    return {"method": method, "bits": bits.lower()} if isinstance(method, str) and isinstance(bits, str) else {}


def report_text(report: dict[str, Any], table: str, pictures: Path | None = None, beside: Path | None = None) -> str:
    """The report as Markdown: what was measured, the table, and links to the comparison images.

    Args:
        table: the rows, see `markdown`.
        pictures, beside: the folder of the comparison images and that of the report, when both are written.
    """
    data, settings = report["data"], report["settings"]
    unchecked = [model for model, listed in data["unseen_by_record"].items() if not listed]
    clips = data.get("clips")
    what = "images" if clips is None else "clips"
    count = f"{data['count']} {what}" if clips is None else f"{data['count']} {what} ({sum(clips.values())} frames)"
    lines = [
        f"{count} of {data['folder']}, low resolution: {settings['degradation']}. {report['hardware']},"
        f" {settings['dtype']}, {'tiles of ' + str(settings['tile_size']) if settings['tile_size'] else 'no tiles'}.",
        "",
        table,
    ]
    if not settings["ground_truth"]:
        lines += ["", "There is no ground truth: metrics that need one are measured against the output of full precision alone."]
    if unchecked:
        lines += [
            "",
            f"The records of {', '.join(unchecked)} list no files: whether these {what} were trained on is not checked.",
        ]
    if pictures and beside:
        folder = Path(os.path.relpath(pictures, beside))
        if data["page"]:
            lines.append(f"\n[Any two of them over one another](<{(folder / data['page']).as_posix()}>), for the first images.")
        lines += [f"\n![{name}](<{(folder / name).as_posix()}>)" for name in data["comparisons"]]
    return "\n".join(lines) + "\n"


def write_report(path: Path, report: dict[str, Any], text: str) -> None:
    """Writes the report as JSON and, beside it, as Markdown, each whole or not at all."""
    content = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_whole(path, content.encode())
    write_whole(path.with_suffix(".md"), text.encode())


def read_report(path: str) -> dict[str, Any]:
    """A report that `write_report` wrote.

    Raises:
        OSError: no such file. ValueError: it is none.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        complete = {"data", "settings", "rows"} <= report.keys()
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(f"--ours {path}: not a report of `qartsr evaluate`; one is written with --output")
    return report


class FirstImages:
    """A page with a slider between any two outputs, of the first images only: a page of all would be too large."""

    def __init__(self) -> None:
        self.comparisons: list[Comparison] = []
        self._pixels = 0

    def add(self, image: ImageOutputs) -> None:
        """Adds the image unless the page is full."""
        height, width = next(iter(image.outputs.values())).shape[-2:]
        self._pixels += height * width * len(image.outputs)
        if height * width <= MOST_IMAGE_PIXELS and self._pixels <= PAGE_PIXELS and len(image.outputs) > 1:
            versions = [NamedImage(name, as_pixels(output)) for name, output in image.outputs.items()]
            self.comparisons.append(Comparison(Path(image.label).name, versions, left=0, right=1))

    def content(self, data: str) -> bytes:
        """The page, whose title names the data."""
        first = f"The first {len(self.comparisons)} images." if len(self.comparisons) > 1 else "The first image."
        return comparison_page(f"Models on {data}", self.comparisons, first)


def low_resolution(layout: str, degradation: str) -> str:
    """Where the low-resolution images come from, for the report."""
    if layout == NO_GROUND_TRUTH:
        return "the images themselves"
    return f"{degradation}, 8 bits" if layout == HR_ONLY else f"as the {layout} folder gives it"


def check_output(path: Path) -> None:
    """Says at the start, not after an hour, that the report cannot be written."""
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"--output {path}: not a file name in a folder that can be written to")
    if path.suffix == ".md":
        raise UsageError(f"--output {path}: name the JSON file; the Markdown one is written beside it")


def comparison_path(pictures: Path, folder: Path, original: Path) -> Path:
    """Where the comparison of an original goes; sub-folders of the data may hold the same name."""
    return pictures / "_".join(original.relative_to(folder).with_suffix(".png").parts)


def write_comparison(path: Path, image: ImageOutputs) -> None:
    """All outputs side by side under their names, with the middle third of each enlarged below."""
    height, width = next(iter(image.outputs.values())).shape[-2:]
    detail = (width // 3, height // 3, width // 3 + max(1, width // 3), height // 3 + max(1, height // 3))
    sheet = comparison_sheet({name: as_pixels(output) for name, output in image.outputs.items()}, detail)
    write_image(path, sheet.astype(np.float32) / 255, ImageFile(sheet))
