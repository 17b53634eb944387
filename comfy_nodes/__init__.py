"""Nodes for ComfyUI (V3 schema). The repository or this folder is placed, or linked, in ComfyUI's custom_nodes/.

Importing this package imports neither ComfyUI nor torch: the nodes are imported when ComfyUI asks for them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> ComfyExtension:
    """Returns the nodes to ComfyUI. If packages are missing there are none, and one line in the log says what to install."""
    from comfy_api.latest import ComfyExtension, io
    from server import PromptServer

    from .installation import copy_samples, import_own_package, what_is_missing

    missing = what_is_missing()
    listed: list[type[io.ComfyNode]] = []
    if missing:
        logging.error("QArtSR's nodes are not loaded: %s", missing)
    else:
        import_own_package()
        from .import_checkpoint import QArtSRImport
        from .load_folder import QArtSRLoadFolder
        from .load_model import QArtSRLoadModel, QArtSRLoadVideoModel, remember_hub_models
        from .model_folders import register_model_folder
        from .model_info import QArtSRModelInfo
        from .quantize import QArtSRQuantize
        from .upscale import QArtSRUpscale
        from .video_upscale import QArtSRVideoFrames, QArtSRVideoUpscale

        register_model_folder()
        copy_samples()
        if (server := getattr(PromptServer, "instance", None)) is not None:
            server.add_on_prompt_handler(remember_hub_models)
        # Their ids are stored in users' workflows: none is ever renamed or removed.
        listed += [QArtSRLoadModel, QArtSRUpscale, QArtSRModelInfo, QArtSRQuantize, QArtSRImport, QArtSRLoadFolder]
        listed += [QArtSRLoadVideoModel, QArtSRVideoUpscale, QArtSRVideoFrames]

    class QArtSRExtension(ComfyExtension):
        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            return listed

    return QArtSRExtension()
