"""Saved, uploaded, and loaded again from the cache without a network, by our class and by the generic one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
from diffusers.utils import hub_utils

from qartsr_pipeline.checkpoint_files import CheckpointError, fetch
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline

ROOT = Path(__file__).resolve().parent.parent
PHOTO = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

LOAD = """
import sys
import numpy as np
from diffusers import DiffusionPipeline
assert "qartsr_pipeline" not in sys.modules
sys.modules["numba"] = None  # as in the process of the tests, for equal bits
photo = np.load(sys.argv[1])
for name in sys.argv[2:]:
    pipeline = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    layers = sum(type(module).__name__.startswith("Deployed") for module in pipeline.unet.modules())
    print(type(pipeline).__name__, layers > 0, pipeline(photo, output_type="np").images.tobytes().hex()[:4000])
"""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A quantized pipeline, loaded and saved again, and its folder."""
    pipeline = QArtSRPipeline.from_pretrained("tiny-w4a4")
    pipeline.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("quantized")
    pipeline.save_pretrained(folder)
    return pipeline, folder


def cached(folder, cache):
    """The hub's cache as it is after owner/name, with the content of `folder`, was downloaded; returns the snapshot's folder."""
    repository, commit = cache / "models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def test_the_generic_class_loads_a_quantized_folder_and_the_cached_repository_in_a_fresh_process(quantized, tmp_path):
    pipeline, folder = quantized
    cached(folder, tmp_path / "cache")
    np.save(tmp_path / "photo.npy", PHOTO)
    settings = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "photo.npy"), str(folder), "owner/name"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    expected = pipeline(PHOTO, output_type="np").images.tobytes().hex()[:4000]
    assert [line.split() for line in done.stdout.splitlines()] == [["QArtSRPipeline", "True", expected]] * 2


def test_diffusers_takes_every_component_of_a_repository(quantized):
    """It asks before it downloads: a component of another package must bring its module along."""
    _, folder = quantized
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    index = json.loads((folder / "model_index.json").read_text())
    custom, _ = _get_custom_components_and_folders("owner/name", index, files)
    assert custom == {"prompt_embedding": "component"}


@pytest.fixture
def uploaded(tmp_path, monkeypatch):
    """Uploads arrive in a folder; returns it and the list of what was asked for."""
    asked, target = [], tmp_path / "uploaded"

    def upload_folder(repo_id, folder_path, **options):
        asked.append((repo_id, {name: value for name, value in options.items() if value}))
        shutil.copytree(folder_path, target)

    def create_repo(repo_id, **options):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/owner/{repo_id.rpartition('/')[-1]}")

    class Card:
        data = None

        def save(self, path):
            Path(path).write_text("card")

    for module in (huggingface_hub, hub_utils):
        monkeypatch.setattr(module, "create_repo", create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", upload_folder)
    for module in (hub_utils, sys.modules["qartsr_pipeline.checkpoint_files.saving"]):
        monkeypatch.setattr(module, "load_or_create_model_card", lambda *arguments, **options: Card())
        monkeypatch.setattr(module, "populate_model_card", lambda card: card)
    return target, asked


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_uploads_are_whole(tiny_pipeline, uploaded, tmp_path, way):
    target, asked = uploaded
    if way == "save_pretrained":
        arguments = {"repo_id": "owner/mine", "private": True, "commit_message": "First"}
        tiny_pipeline.save_pretrained(tmp_path / "saved", push_to_hub=True, **arguments)
    else:
        tiny_pipeline.push_to_hub("owner/mine", commit_message="First")
    assert asked == [("owner/mine", {"commit_message": "First"})]
    files = {"model_index.json", "pipeline.py", "prompt_embedding/component.py", "checksums.json", "README.md"}
    assert all((target / name).is_file() for name in files)
    assert len(json.loads((target / "checksums.json").read_text())) == 8
    loaded = QArtSRPipeline.from_pretrained(target)
    assert np.array_equal(loaded(PHOTO, output_type="np").images, tiny_pipeline(PHOTO, output_type="np").images)


def test_a_card_that_is_there_is_uploaded_as_it_is_and_the_folder_names_the_repository(tiny_pipeline, uploaded, tmp_path):
    target, asked = uploaded
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my own words")
    tiny_pipeline.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert (target / "README.md").read_text() == "my own words" and asked[0][0] == "owner/mine"


def test_offline_a_repository_comes_from_the_cache_and_a_half_downloaded_one_is_named(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = cached(tiny_folder, tmp_path / "cache")
    assert fetch("owner/name", cache_dir=tmp_path / "cache") == snapshot
    assert isinstance(QArtSRPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache"), QArtSRPipeline)
    weights = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "blobs" / "not-there-yet")  # as the cache links to what was to be downloaded
    with pytest.raises(CheckpointError, match="vae/diffusion_pytorch_model.safetensors in .*link.*interrupted.*again"):
        QArtSRPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")
    (snapshot / "model_index.json").write_text(json.dumps({"_class_name": ["pipeline", "OtherPipeline"]}))
    with pytest.raises(CheckpointError, match="owner/name on the Hub.*checkpoint of OtherPipeline.*Load it with"):
        QArtSRPipeline.from_pretrained("owner/name", cache_dir=tmp_path / "cache")
