"""Lets diffusers find the component's class; needs the package: pip install qartsr."""

from qartsr_pipeline.prompt_embedding import PromptEmbedding

__all__ = ["PromptEmbedding"]
