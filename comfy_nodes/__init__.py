"""Nodes for ComfyUI (V3 schema). Either the repository or this folder stands, or is linked, in ComfyUI's custom_nodes/.

Importing this imports neither ComfyUI nor diffusers; what a node needs is imported when it runs.
"""

from __future__ import annotations

import logging
from typing import Any

WEB_DIRECTORY = "web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes. Without what they need there are none, and one line in the log says what to do."""
    from .installation import install_own_packages, what_is_missing

    missing = what_is_missing()
    if missing:
        from comfy_api.latest import ComfyExtension

        logging.error("QArtSR's nodes are not loaded: %s", missing)

        class NoNodes(ComfyExtension):
            async def get_node_list(self) -> list:
                return []

        return NoNodes()
    install_own_packages()
    from .nodes import QArtSRExtension

    return QArtSRExtension()
