"""Lets diffusers find the pipeline's class; needs the package: pip install qartsr."""

from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline

__all__ = ["LSGQuantVideoPipeline"]
