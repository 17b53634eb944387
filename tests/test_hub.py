"""Repositories of the Hub, without the Hub: what is downloaded in which order, and what is refused."""

import json
import shutil

import huggingface_hub
import pytest

from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """A repository that holds `tiny_folder`; returns the list of what was asked for, (id, patterns, other options)."""
    asked = []

    def snapshot_download(repo_id, allow_patterns, **options):
        asked.append((repo_id, allow_patterns, options))
        cache = tmp_path / "cache"
        if allow_patterns == ["model_index.json"]:
            cache.mkdir(exist_ok=True)
            if (tiny_folder / "model_index.json").exists():
                shutil.copy(tiny_folder / "model_index.json", cache)
        else:
            shutil.copytree(tiny_folder, cache, dirs_exist_ok=True)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_repository_is_loaded_with_the_options_given(hub):
    pipeline = QArtSRPipeline.from_pretrained("owner/name", revision="v1", token="secret", cache_dir="/tmp/x")
    assert isinstance(pipeline, QArtSRPipeline)
    assert [repo_id for repo_id, _, _ in hub] == ["owner/name"] * 2
    for _, patterns, options in hub:
        assert (options["revision"], options["token"], options["cache_dir"]) == ("v1", "secret", "/tmp/x")
        assert not any(".py" in pattern or ".pkl" in pattern or ".bin" in pattern for pattern in patterns)


def test_another_pipelines_repository_is_refused_before_its_weights_are_downloaded(hub, tiny_folder):
    (tiny_folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(CheckpointError, match="owner/name on the Hub.*a checkpoint of StableDiffusionPipeline"):
        QArtSRPipeline.from_pretrained("owner/name")
    assert len(hub) == 1
    (tiny_folder / "model_index.json").unlink()
    (tiny_folder.parent / "cache" / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="owner/name on the Hub.*no model_index.json"):
        QArtSRPipeline.from_pretrained("owner/name")


def test_a_download_that_was_interrupted_is_named(hub, tiny_folder):
    weights = tiny_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="unet/diffusion_pytorch_model.safetensors.*truncated.*again"):
        QArtSRPipeline.from_pretrained("owner/name")
    shutil.rmtree(tiny_folder / "unet")
    shutil.rmtree(tiny_folder.parent / "cache" / "unet")
    with pytest.raises(CheckpointError, match="lacks the component folder unet/.*incomplete"):
        QArtSRPipeline.from_pretrained("owner/name")


def test_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="owner/name.*HF_HUB_OFFLINE.*local folder"):
        QArtSRPipeline.from_pretrained("owner/name")
    with pytest.raises(CheckpointError, match="not in the local cache.*local_files_only"):
        QArtSRPipeline.from_pretrained("owner/name", local_files_only=True)
