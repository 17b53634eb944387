"""One-step-diffusion super-resolution at 4 and 2 bits.

Importing this package registers the quantization method "qartsr" with diffusers: stock ``from_pretrained`` then loads our models.
It imports neither torch nor diffusers by itself: `qartsr --help` and the checks of a folder need neither.
"""

from importlib import import_module

from qartsr_pipeline.registration import register_with_diffusers

register_with_diffusers()

_MODULES = {
    "QArtSRPipeline": "qartsr_pipeline.pipeline_qartsr",
    "QArtSRPipelineOutput": "qartsr_pipeline.pipeline_qartsr",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
