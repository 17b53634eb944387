"""One-step-diffusion super-resolution at 4 and 2 bits.

The names below are the public interface. Each is imported from its module when it is first used, because torch and diffusers take
seconds to import, and `qartsr --help` and the checks of a folder need neither.

`QArtSRPipeline` loads its own models. Before a quantized component is loaded with a stock class of diffusers, such as
``UNet2DConditionModel.from_pretrained``, diffusers has to know the quantization method "qartsr":
``import qartsr_pipeline.quantization`` registers it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qartsr_pipeline.calibration.api import QuantizationResult, quantize
    from qartsr_pipeline.calibration.evaluation import EvaluationRow, evaluate
    from qartsr_pipeline.calibration.recipe import Recipe
    from qartsr_pipeline.calibration.recipe_files import load_recipe
    from qartsr_pipeline.checkpoint_files import CheckpointError
    from qartsr_pipeline.kernels import list_backends, use_backend
    from qartsr_pipeline.pipeline_lsgquant import LSGQuantVideoPipeline, LSGQuantVideoPipelineOutput
    from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline, QArtSRPipelineOutput

__all__ = [
    "CheckpointError",
    "EvaluationRow",
    "LSGQuantVideoPipeline",
    "LSGQuantVideoPipelineOutput",
    "QArtSRPipeline",
    "QArtSRPipelineOutput",
    "QuantizationResult",
    "Recipe",
    "evaluate",
    "list_backends",
    "load_recipe",
    "quantize",
    "use_backend",
]

_MODULES = {
    "CheckpointError": "checkpoint_files",
    "EvaluationRow": "calibration.evaluation",
    "LSGQuantVideoPipeline": "pipeline_lsgquant",
    "LSGQuantVideoPipelineOutput": "pipeline_lsgquant",
    "QArtSRPipeline": "pipeline_qartsr",
    "QArtSRPipelineOutput": "pipeline_qartsr",
    "QuantizationResult": "calibration.api",
    "Recipe": "calibration.recipe",
    "evaluate": "calibration.evaluation",
    "list_backends": "kernels",
    "load_recipe": "calibration.recipe_files",
    "quantize": "calibration.api",
    "use_backend": "kernels",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
