"""The nodes. Their ids are written into users' workflows: none is ever renamed or removed."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .import_checkpoint import QArtSRImport
from .load_folder import QArtSRLoadFolder
from .load_model import QArtSRLoadModel
from .model_folders import register_model_folder
from .model_info import QArtSRModelInfo
from .quantize import QArtSRQuantize
from .upscale import QArtSRUpscale

NODES: list[type[io.ComfyNode]] = [
    QArtSRLoadModel,
    QArtSRUpscale,
    QArtSRModelInfo,
    QArtSRQuantize,
    QArtSRImport,
    QArtSRLoadFolder,
]


class QArtSRExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        register_model_folder()
        return NODES
