"""Lets diffusers find the pipeline's class; needs the package: pip install qartsr."""

from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

__all__ = ["QArtSRPipeline"]
