"""Which family a pipeline, or a checkpoint folder, is of."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline

from qartsr_pipeline.calibration.family import Family
from qartsr_pipeline.calibration.image_family import ImageFamily
from qartsr_pipeline.calibration.video_family import VideoFamily
from qartsr_pipeline.checkpoint_files.checking import named_class, read_model_index
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

FAMILIES: dict[type[CheckpointPipeline], Family] = {QArtSRPipeline: ImageFamily(), LSGQuantVideoPipeline: VideoFamily()}


def family_of(pipeline: DiffusionPipeline) -> Family:
    """The family of a pipeline.

    Raises:
        TypeError: there is none for pipelines of this class.
    """
    for kind, family in FAMILIES.items():
        if isinstance(pipeline, kind):
            return family
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    raise TypeError(f"{type(pipeline).__name__} cannot be quantized here; there is a family for {known}")


def kind_of_folder(folder: Path) -> type[CheckpointPipeline]:
    """The pipeline class that a checkpoint folder names; raises CheckpointError if it is none of ours."""
    name = named_class(read_model_index(folder))
    return next(kind for kind in FAMILIES if kind.__name__ == name)
