"""A folder is saved whole or not at all, and never mixes two saves."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.checkpoint_files import CheckpointError, saving
from qartsr_pipeline.whole_files import MARK
from tiny_models import build_tiny_pipeline


def assert_loads_as(folder, pipeline, **options):
    loaded = QArtSRPipeline.from_pretrained(folder, **options)
    for name in ("unet", "vae", "prompt_embedding"):
        expected = getattr(pipeline, name).state_dict()
        found = getattr(loaded, name).state_dict()
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def other():
    return build_tiny_pipeline(seed=1)


@pytest.mark.parametrize("first", [{"max_shard_size": "20KB"}, {"variant": "fp16", "max_shard_size": "20KB"}, {}])
def test_a_later_save_replaces_all_weights_and_leaves_other_files(tiny_pipeline, other, tmp_path, first):
    tiny_pipeline.save_pretrained(tmp_path / "a", **first)
    (tmp_path / "a" / "notes.md").write_text("mine")
    other.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    files = {path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*")}
    assert {path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*")} - files == {type(tmp_path)("notes.md")}
    assert_loads_as(tmp_path / "a", other)
    other.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert_loads_as(tmp_path / "a", other)


def test_a_variant_beside_other_weights_is_refused_and_alone_is_loaded(tiny_pipeline, tiny_folder, tmp_path):
    with pytest.raises(FileExistsError, match="Save each variant in a folder of its own"):
        tiny_pipeline.save_pretrained(tiny_folder, variant="fp16")
    tiny_pipeline.save_pretrained(tmp_path / "v", variant="fp16", max_shard_size="20KB")
    tiny_pipeline.save_pretrained(tmp_path / "v", variant="fp16")
    with pytest.raises(CheckpointError, match="load it with variant='fp16'"):
        QArtSRPipeline.from_pretrained(tmp_path / "v")
    assert_loads_as(tmp_path / "v", tiny_pipeline, variant="fp16")


@pytest.mark.parametrize("over", [True, False])
def test_a_save_that_fails_leaves_everything_as_it_was(tiny_pipeline, other, tmp_path, monkeypatch, over):
    folder = tmp_path / "a"
    if over:
        tiny_pipeline.save_pretrained(folder)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written = DiffusionPipeline.save_pretrained

    def full(self, directory, **options):
        written(self, directory, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="could not be written .*No space left.*is unchanged. Free some space"):
        other.save_pretrained(folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert over == folder.exists() and len(list(tmp_path.iterdir())) == over


CHANGES = {
    "a layer more": lambda pipe: setattr(pipe.vae, "adapter", torch.nn.Linear(2, 2)),
    "a layer less": lambda pipe: delattr(pipe.vae, "post_quant_conv"),
    "another layer": lambda pipe: setattr(pipe.unet, "conv_in", torch.nn.Conv2d(4, 2, 3)),
    "a value of the configuration": lambda pipe: pipe.unet.register_to_config(cross_attention_dim=7),
    "no timestep": lambda pipe: pipe.register_to_config(timestep=-1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("over", [True, False])
def test_a_pipeline_that_could_not_be_loaded_again_is_not_saved(tiny_pipeline, other, tmp_path, over, change):
    folder = tmp_path / "a"
    if over:
        tiny_pipeline.save_pretrained(folder)
    CHANGES[change](other)
    with pytest.raises(
        CheckpointError, match="was not saved, because it could not be loaded again: .* take adapters off"
    ) as told:
        other.save_pretrained(folder)
    assert str(folder) in str(told.value) and MARK not in str(told.value) and "ownload" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if over else [])
    if over:
        assert_loads_as(folder, tiny_pipeline)


def test_a_file_that_cannot_be_replaced_leaves_the_earlier_checkpoint(tiny_folder, other, monkeypatch):
    """As on Windows, where a file that is open elsewhere cannot be."""
    (tiny_folder / "pipeline.py").unlink()
    before = {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}
    replace = os.replace

    def refuse(source, target):
        if MARK in str(source) and target == tiny_folder / "unet" / "config.json" and "earlier" not in source.parts:
            raise PermissionError(13, "it is in use")
        replace(source, target)

    monkeypatch.setattr(saving.os, "replace", refuse)
    with pytest.raises(OSError, match="in use.*is unchanged"):
        other.save_pretrained(tiny_folder)
    assert {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()} == before


def at_the_fourth_file(tiny_folder, then):
    """`os.replace`, which at the fourth file that comes into the folder does something else."""
    moved, replace = [], os.replace

    def moving(source, target):
        if tiny_folder in target.parents and MARK in str(source) and "earlier" not in source.parts:
            moved.append(target)
            if len(moved) == 4:
                then()
        replace(source, target)

    return moving


def test_an_interruption_between_two_files_brings_the_earlier_ones_back(tiny_folder, other, monkeypatch):
    before = {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()}

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.os, "replace", at_the_fourth_file(tiny_folder, interrupt))
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(tiny_folder)
    assert {path: path.read_bytes() for path in tiny_folder.rglob("*") if path.is_file()} == before
    QArtSRPipeline.from_pretrained(tiny_folder)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process ends in a copy of this one")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_process_that_ends_between_two_files_leaves_a_folder_that_is_refused(tiny_folder, other):
    child = os.fork()
    if not child:
        try:
            saving.os.replace = at_the_fourth_file(tiny_folder, lambda: os._exit(9))
            other.save_pretrained(tiny_folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(path.name.startswith(MARK) for path in tiny_folder.iterdir())
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        QArtSRPipeline.from_pretrained(tiny_folder)
    other.save_pretrained(tiny_folder)
    assert_loads_as(tiny_folder, other)
    assert not any(path.name.startswith(MARK) for path in tiny_folder.iterdir())


def test_what_a_killed_save_left_is_removed_by_the_next_one(tiny_pipeline, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = tmp_path / f"{MARK}{platform.node()}-{ended.pid}-0123abcd"
    running = tmp_path / f"{MARK}{platform.node()}-{os.getpid()}-0123abcd"
    elsewhere = tmp_path / f"{MARK}another-host-1-0123abcd"
    for folder in (left, running, elsewhere):
        (folder / "unet").mkdir(parents=True)
    tiny_pipeline.save_pretrained(tmp_path / "a")
    assert not left.exists() and running.exists() and elsewhere.exists()


def test_what_cannot_become_a_folder_says_so(tiny_pipeline, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="Choose another name"):
        tiny_pipeline.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="could not be written"):
        tiny_pipeline.save_pretrained(tmp_path / "file" / "below")
