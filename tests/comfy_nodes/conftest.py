"""ComfyUI's modules as far as the nodes use them, so that the nodes are tested without ComfyUI."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import comfy_schema  # noqa: E402
from comfy_classes import InterruptProcessingException, VideoFromFile  # noqa: E402


class Comfy:
    """What a test looks at and sets.

    Attributes:
        said: lines of text that were shown on the node.
        progress: (value, total, preview) of every step that was shown; "prepared" has those before a training's first step.
        cancel_at: how often the nodes may look for a cancel before there is one.
        cancel_at_step: the step that is cancelled when it is shown.
        handlers: functions that ComfyUI calls with each graph that it is given.
    """

    def __init__(self):
        self.said: list[str] = []
        self.progress: list[tuple] = []
        self.prepared: list[tuple] = []
        self.cancel_at: int | None = None
        self.cancel_at_step: int | None = None
        self.handlers: list = []
        self.looked = 0
        self._told: int | None = None

    def throw_if_cancelled(self) -> None:
        """Tells of a cancel once, as ComfyUI does."""
        self.looked += 1
        if self.cancel_at is not None and self.looked > self.cancel_at != self._told:
            self._told = self.cancel_at
            raise InterruptProcessingException


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """Stands in for ComfyUI, with an empty models folder under `tmp_path`."""
    state, cpu = Comfy(), torch.device("cpu")
    monkeypatch.setattr("qartsr_pipeline.cli.device.has_bfloat16", lambda: False)  # images are compared with float32's

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None, preview=None):
            state.throw_if_cancelled()
            preparing = bool(state.said) and not state.said[-1].startswith("train: ")
            if value == state.cancel_at_step and not preparing:
                raise InterruptProcessingException
            (state.prepared if preparing else state.progress).append((value, total, preview))

    def say(text: str, node_id: str) -> None:
        assert node_id == "7"
        state.said.append(text)

    management = {
        "InterruptProcessingException": InterruptProcessingException,
        "unload_all_models": lambda: None,
        "throw_exception_if_processing_interrupted": state.throw_if_cancelled,
        "load_models_gpu": lambda *args, **kwargs: None,
        "soft_empty_cache": lambda: None,
        "get_torch_device": lambda: cpu,
        "unet_offload_device": lambda: cpu,
        "OOM_EXCEPTION": torch.OutOfMemoryError,
    }
    modules = {
        "comfy": {},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": management,
        "comfy.model_patcher": {
            "ModelPatcher": lambda model, load_device, offload_device: SimpleNamespace(model=model, load_device=load_device)
        },
        "comfy_api": {},
        "comfy_api.latest": {
            "io": comfy_schema.io,
            "ui": SimpleNamespace(
                PreviewText=lambda text: {"text": (text,)}, PreviewImage=lambda image, cls=None: {"images": image}
            ),
            "ComfyExtension": type("ComfyExtension", (), {}),
            "InputImpl": SimpleNamespace(VideoFromFile=VideoFromFile),
        },
        "comfy_execution": {},
        "comfy_execution.utils": {"get_executing_context": lambda: SimpleNamespace(node_id="7")},
        "server": {
            "PromptServer": SimpleNamespace(
                instance=SimpleNamespace(send_progress_text=say, add_on_prompt_handler=state.handlers.append)
            )
        },
        "folder_paths": {"models_dir": str(tmp_path / "models"), "folder_names_and_paths": {}},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.split(".")[0]], name.split(".")[1], module)
    paths = sys.modules["folder_paths"]
    paths.get_folder_paths = lambda kind: paths.folder_names_and_paths[kind][0]

    def full_path(kind, name):
        """As ComfyUI's, of models/KIND."""
        path = tmp_path / "models" / kind / name
        return str(path) if path.is_file() else None

    paths.get_full_path = full_path
    paths.get_input_directory = lambda: str(tmp_path / "input")
    paths.get_temp_directory = lambda: str(tmp_path / "temp")
    paths.get_user_directory = lambda: str(tmp_path / "user")
    for name in [name for name in sys.modules if name.startswith("comfy_nodes.")]:
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("comfy_nodes.model_folders").register_model_folder()
    return state


@pytest.fixture
def nodes(comfy):
    """Id -> class of every node, as ComfyUI gets them, with schemas that it accepts."""
    import comfy_nodes

    listed = asyncio.run(asyncio.run(comfy_nodes.comfy_entrypoint()).get_node_list())
    found = {}
    for node in listed:
        schema = node.define_schema()
        schema.validate()
        found[schema.node_id] = node
    return found


@pytest.fixture
def model(comfy, tiny_folder):
    """A loaded model with a few thousand random weights."""
    from comfy_nodes.managed_model import load_model

    return load_model("tiny", tiny_folder, "auto", "auto")
