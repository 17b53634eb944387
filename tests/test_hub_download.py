"""Downloads by the real `huggingface_hub`, from a server on this machine."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from local_hub import LocalHub

from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

WEIGHTS = sorted(f"{name}/diffusion_pytorch_model.safetensors" for name in ("prompt_embedding", "unet", "vae"))


@pytest.fixture
def hub(tiny_folder, tmp_path, monkeypatch):
    """owner/name with the content of `tiny_folder`, and an empty cache."""
    with LocalHub("owner/name", Path(shutil.copytree(tiny_folder, tmp_path / "repository"))) as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


def test_files_are_downloaded_once_and_work_offline_afterwards(hub, monkeypatch):
    (hub.folder / "osediff.pkl").write_bytes(b"never asked for")
    first = QArtSRPipeline.from_pretrained("owner/name")
    assert sorted(hub.weights_sent()) == WEIGHTS
    assert not any(".pkl" in request or ".py" in request for request in hub.asked)
    QArtSRPipeline.from_pretrained("owner/name", revision="main")
    assert sorted(hub.weights_sent()) == WEIGHTS
    requests = len(hub.asked)
    again = QArtSRPipeline.from_pretrained("owner/name", local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    QArtSRPipeline.from_pretrained("owner/name")
    assert len(hub.asked) == requests
    assert again.unet.state_dict().keys() == first.unet.state_dict().keys()


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub):
    hub.break_after = 20_000
    assert isinstance(QArtSRPipeline.from_pretrained("owner/name"), QArtSRPipeline)
    assert hub.break_after is None and len(hub.weights_sent()) == len(WEIGHTS) + 1


def test_a_revision_that_is_not_there(hub):
    with pytest.raises(CheckpointError, match="owner/name has no revision 'v2'"):
        QArtSRPipeline.from_pretrained("owner/name", revision="v2")


def test_a_private_repository_needs_its_token(hub):
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match="no repository 'owner/name' that you may see.*hf auth login.*`token`"):
        QArtSRPipeline.from_pretrained("owner/name")
    assert isinstance(QArtSRPipeline.from_pretrained("owner/name", token="hf_secret"), QArtSRPipeline)


def test_a_hub_that_is_gone(hub):
    hub.__exit__()
    with pytest.raises(CheckpointError, match="owner/name could not be downloaded.*Check the network"):
        QArtSRPipeline.from_pretrained("owner/name")
