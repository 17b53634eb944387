"""What all cells of a comparison share: models, photographs, and the folder in which finished ones are found again."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calibration.comparison.methods import Cell
from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.patches import PhotographPatches
from qartsr_pipeline.calibration.saving import write_whole
from qartsr_pipeline.calibration.training.losses import Perceptual, load_perceptual
from qartsr_pipeline.calibration.training.stages import weights_digest
from qartsr_pipeline.checkpoint_files import fetch


@dataclass
class Model:
    """A full-precision model, its outputs on the evaluation pictures, and its pictures of the held-out patches."""

    pipeline: QArtSRPipeline
    device: str
    digest: str
    perceptual: Perceptual
    references: dict[Path, list[torch.Tensor]] = field(default_factory=dict)
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
    return Model(pipeline, device, weights_digest(pipeline), load_perceptual("encoder", pipeline.vae))


@dataclass
class Comparison:
    """Everything that cells are made from.

    Attributes:
        models: "" and, where it is given, "t999".
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

    def finished(self, path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
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
