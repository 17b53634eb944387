"""QArtSR Load Model with a Hub id: the real `huggingface_hub`, from a server on this machine."""

import shutil
import sys
from pathlib import Path

import pytest
from local_hub import LocalHub

from qartsr_pipeline.checkpoint_files import CheckpointError


@pytest.fixture
def hub(comfy, tiny_folder, tmp_path, monkeypatch):
    """owner/name with the content of `tiny_folder`."""
    with LocalHub("owner/name", Path(shutil.copytree(tiny_folder, tmp_path / "repository"))) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def load(nodes):
    return nodes["QArtSRLoadModel"].execute(model="tiny-w8a8", hub_id=" owner/name ", backend="auto", dtype="auto").args[0]


def test_a_repository_is_downloaded_once_with_a_bar_and_is_a_model_like_others_afterwards(hub, comfy, nodes, tmp_path):
    from comfy_nodes.model_folders import find_models

    assert load(nodes).name == "owner/name"
    size = sum(path.stat().st_size for path in hub.folder.rglob("*.safetensors"))
    assert comfy.progress[-1][0] == comfy.progress[-1][1] > size
    assert all(value <= total for value, total, _ in comfy.progress)
    target = tmp_path / "models" / "qartsr" / "owner" / "name"
    assert find_models()["owner/name"] == target and not (target / ".cache").exists()
    hub.__exit__()
    load(nodes)


@pytest.mark.parametrize("looks", range(4, 14, 3))
def test_a_cancelled_download_is_told_as_such_and_its_complete_files_are_used(hub, comfy, nodes, tmp_path, looks):
    """ComfyUI tells one thread of a cancel, once, also where only the bar is moved."""
    cancelled = sys.modules["comfy.model_management"].InterruptProcessingException
    comfy.cancel_at = looks
    with pytest.raises(cancelled):
        load(nodes)
    assert not (tmp_path / "models" / "qartsr" / "owner").exists()
    unfinished = tmp_path / "models" / "qartsr" / ".downloads" / "owner--name"
    complete = {path.relative_to(unfinished).as_posix() for path in unfinished.rglob("*.*")} & set(hub.files_sent())
    comfy.cancel_at = None
    load(nodes)
    assert complete and all(hub.files_sent().count(name) == 1 for name in complete)


def test_a_model_below_an_extra_path_is_not_downloaded(hub, nodes, tmp_path):
    import folder_paths

    extra = tmp_path / "extra"
    folder_paths.folder_names_and_paths["qartsr"][0].append(str(extra))
    shutil.copytree(hub.folder, extra / "owner" / "name")
    assert load(nodes).folder == extra / "owner" / "name" and not hub.asked


def test_a_repository_of_something_else_leaves_nothing(hub, nodes, tmp_path):
    (hub.folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="owner/name on the Hub is not a checkpoint.*StableDiffusionPipeline"):
        load(nodes)
    assert not hub.weights_sent() and not (tmp_path / "models" / "qartsr" / "owner").exists()
