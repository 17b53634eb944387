"""Measuring models on images, and looking at what they make of them."""

from qartsr_pipeline.calibration.evaluation.api import evaluate
from qartsr_pipeline.calibration.evaluation.clips import evaluate_clips
from qartsr_pipeline.calibration.evaluation.comparison import ComparisonPage, compare
from qartsr_pipeline.calibration.evaluation.rows import EvaluationRow

__all__ = ["ComparisonPage", "EvaluationRow", "compare", "evaluate", "evaluate_clips"]
