"""Measuring models on images."""

from qartsr_pipeline.calibration.evaluation.api import evaluate
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow

__all__ = ["EvaluationRow", "evaluate"]
