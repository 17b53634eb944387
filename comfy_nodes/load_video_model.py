"""QArtSR Load Video Model: loads a model for clips, or one for images that enlarges frame by frame."""

from __future__ import annotations

from comfy_api.latest import io

from qartsr_pipeline.checkpoint_files import DEFAULT_CHECKPOINT

from .load_model import CATEGORY, LoadingNode, found_by, loading_inputs
from .model_folders import FOR_BOTH, FOR_CLIPS, class_of, find_models, label_of_model

QArtSRVideoModel = io.Custom("QARTSR_VIDEO_MODEL")


class QArtSRLoadVideoModel(LoadingNode):
    classes = FOR_BOTH

    @classmethod
    def define_schema(cls) -> io.Schema:
        labels = {}
        for name, folder in find_models(cls.classes).items():
            kind = "for clips" if class_of(folder) in FOR_CLIPS else "for images, frame by frame"
            labels[name] = ", ".join(filter(None, (kind, label_of_model(folder))))
        best = next((name for name in labels if labels[name].startswith("for clips")), DEFAULT_CHECKPOINT)
        return io.Schema(
            node_id="QArtSRLoadVideoModel",
            display_name="QArtSR Load Video Model",
            category=CATEGORY,
            description="Loads a model that enlarges clips. Put models into models/qartsr.",
            **found_by("video upscale model", "video super resolution model"),
            inputs=loading_inputs(
                labels,
                best,
                "Models for clips come first: they see many frames at once, so detail stays steady. Models for images enlarge one"
                " frame after another, and their finest detail may flicker.",
            ),
            outputs=[
                QArtSRVideoModel.Output(
                    id="video_model", display_name="model", tooltip="For QArtSR Video Upscale and QArtSR Video Frames."
                )
            ],
        )

    @classmethod
    def execute(cls, model: str, hub_id: str, backend: str, dtype: str) -> io.NodeOutput:
        return io.NodeOutput(cls.load(model, hub_id, backend, dtype))
