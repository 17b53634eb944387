"""What all cells of a comparison share: models, photographs, and the folder that keeps finished cells."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calibration.comparison.methods import Cell
from qartsr_pipeline.calibration.data.fingerprint import check_no_overlap, data_fingerprint, file_digests, overlap
from qartsr_pipeline.calibration.data.pairs import choose_held_out
from qartsr_pipeline.calibration.data.patches import PhotographPatches, list_photographs
from qartsr_pipeline.calibration.evaluation.metrics import load_metrics
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.training.losses import Perceptual, load_perceptual
from qartsr_pipeline.checkpoint_files import fetch
from qartsr_pipeline.cli.device import choose_device
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline
from qartsr_pipeline.whole_files import write_whole

HELD_OUT = 8  # photographs that are not calibrated on: they choose the learning rate


@dataclass
class Model:
    """A full-precision model.

    Attributes:
        digest: of its weights.
        references: its outputs on the evaluation images, see `Evaluation`.
        held_out: enlarged held-out patches, and its outputs for them.
    """

    pipeline: QArtSRPipeline
    device: str
    digest: str
    perceptual: Perceptual
    references: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    held_out: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def fresh(self) -> QArtSRPipeline:
        """Another instance, to be quantized."""
        return copy.deepcopy(self.pipeline)


def load_model(name: str, device: str) -> Model:
    """Raises ValueError if the model is quantized already, and see `QArtSRPipeline.from_pretrained`."""
    pipeline = QArtSRPipeline.from_pretrained(fetch(name)).to(device)
    pipeline.set_progress_bar_config(disable=True)
    if any(getattr(model, "is_quantized", False) for model in (pipeline.unet, pipeline.vae)):
        raise ValueError(f"{name} is quantized already: compare on the full-precision model")
    return Model(pipeline, device, family_of(pipeline).digest(pipeline), load_perceptual("encoder", pipeline.vae))


@dataclass(frozen=True)
class Sources:
    """What a comparison is made from, as names and paths.

    Attributes:
        models: "" and, where there is one, "t999" -> checkpoint folder, shipped name or Hub id.
        data, evaluate: folders of photographs, to calibrate on and to measure on.
        limit: only so many of the latter, the first by name.
        metrics: further ones, by pyiqa.
        device: auto, cuda, mps or cpu.
    """

    models: dict[str, str]
    data: str
    evaluate: str
    output: Path
    limit: int | None = None
    metrics: tuple[str, ...] = ()
    device: str = "auto"


@dataclass
class Comparison:
    """Everything that cells are made from.

    Attributes:
        models: by the names of `Sources.models`.
        data: fingerprints, for the settings of every cell.
    """

    output: Path
    models: dict[str, Model]
    patches: PhotographPatches
    held_out: list[Path]
    evaluation: list[Path]
    data: dict[str, Any]
    metrics: list[str]
    device: str

    def settings(self, cell: Cell) -> dict[str, Any]:
        """What a cell's numbers depend on, as JSON types."""
        settings = {"recipe": cell.method.recipe.to_dict(), "bits": cell.bits, "seed": cell.seed, "metrics": self.metrics}
        return json.loads(json.dumps(settings | {"model": self.models[cell.model].digest} | self.data))


def finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """A file's content if it is there.

    Raises:
        ValueError: it is of other settings, or damaged; the message names the file.
    """
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        other = difference(content["settings"], settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a cell ({type(error).__name__}): remove it to make it again") from error
    if other:
        raise ValueError(f"{path} was made with other settings, {other}: choose another --output, or remove the file")
    return content


def prepare(sources: Sources) -> Comparison:
    """Checks the sources and loads models and photographs.

    Raises:
        ValueError, OSError, ImportError: the message says which source is wrong.
    """
    device, _ = choose_device(sources.device)
    paths, evaluation = list_photographs(sources.data), list_photographs(sources.evaluate)[: sources.limit]
    seen = overlap(evaluation, file_digests(paths))
    if seen:
        raise ValueError(f"{seen[0]} is among the photographs of --data: evaluate on others")
    if len(paths) <= HELD_OUT:
        raise ValueError(f"{sources.data} has {len(paths)} photographs; more than {HELD_OUT} are needed, which are held out")
    load_metrics(sources.metrics, device)
    held_out = choose_held_out(paths, HELD_OUT)
    for name in sources.models.values():
        check_no_overlap(evaluation, fetch(name))
    models = {name: load_model(folder, device) for name, folder in sources.models.items()}
    data = {"calibration": data_fingerprint(paths), "evaluation": data_fingerprint(evaluation), "degradation": "bicubic"}
    patches = PhotographPatches([path for path in paths if path not in set(held_out)])
    return Comparison(sources.output, models, patches, held_out, evaluation, data, list(sources.metrics), device)


def difference(there: Any, asked: Any, where: str = "") -> str:
    """The first entry in which two JSON values differ, for a message; "" if they are equal."""
    if isinstance(there, dict) and isinstance(asked, dict):
        for key in [*there, *(key for key in asked if key not in there)]:
            found = difference(there.get(key), asked.get(key), f"{where}.{key}" if where else str(key))
            if found:
                return found
        return ""
    if isinstance(there, list) and isinstance(asked, list) and len(there) == len(asked):
        return next(
            filter(None, (difference(*pair, f"{where}.{i}") for i, pair in enumerate(zip(there, asked, strict=True)))), ""
        )
    return "" if there == asked else f"{where} is {json.dumps(there)} there and {json.dumps(asked)} here"


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
