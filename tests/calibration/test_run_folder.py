"""The folder of a run: one process at a time, nothing left of killed ones, disks that are full, read-only or damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from qartsr_pipeline import folder_lock, quantize
from qartsr_pipeline.calibration import job, run_folder
from qartsr_pipeline.calibration.arguments import Order, RunArguments
from qartsr_pipeline.calibration.run_folder import check_free
from qartsr_pipeline.calibration.saving import load_tensors, save_tensors
from qartsr_pipeline.cli.quantize import arguments_of
from qartsr_pipeline.folder_lock import FolderInUseError, FolderLock
from qartsr_pipeline.whole_files import SavingError, write_whole
from tiny_models import build_tiny_pipeline


def test_a_second_process_is_told_who_works_in_the_folder(tmp_path):
    with FolderLock(tmp_path).take() as first:
        assert first.held
        with pytest.raises(FolderInUseError, match=f"{tmp_path} is in use by process {os.getpid()} on .* since 20..-"):
            FolderLock(tmp_path).take()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path).take() as killed:
        killed._file.close()  # as the system does for a process that was killed; the file stays
        with FolderLock(tmp_path).take():
            pass


def test_a_lock_ends_in_a_folder_that_became_unwritable(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(RuntimeError, match="what went wrong"), FolderLock(tmp_path).take() as lock:
        monkeypatch.setattr(Path, "unlink", refused)
        raise RuntimeError("what went wrong")
    assert not lock.held
    with FolderLock(tmp_path).take():
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
def test_a_full_disk_does_not_keep_a_lock_from_being_taken(tmp_path):
    (tmp_path / ".lock").symlink_to("/dev/full")
    with FolderLock(tmp_path).take() as lock:
        assert lock.held
    assert not lock.held


def test_a_lock_that_its_holder_is_about_to_remove_is_not_taken(tmp_path, monkeypatch):
    """Between opening and locking it the file was removed, and another process has made and locked a new one."""
    holder, real = FolderLock(tmp_path), folder_lock._lock

    def too_late(file):
        monkeypatch.setattr(folder_lock, "_lock", real)
        Path(file.name).unlink()
        holder.take()
        return real(file)

    monkeypatch.setattr(folder_lock, "_lock", too_late)
    with holder, pytest.raises(FolderInUseError):
        FolderLock(tmp_path).take()


def test_quantizing_into_a_folder_in_use_leaves_it_alone(tmp_path):
    with FolderLock(tmp_path).take() as lock:
        before = lock.path.read_text()
        with pytest.raises(FolderInUseError, match="wait until that ends, stop it, or choose another output folder"):
            quantize(build_tiny_pipeline(), output=tmp_path, device="cpu")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"] and lock.path.read_text() == before


LEFT_OVER = [
    ".model.0123abcd",
    ".model.0123abcd.old",
    ".given-0123456789abcdef.0123abcd",
    ".activations.x_1",
    ".state.pt.0123abcd.tmp",
    ".0123456789ab.part",
    ".qartsr-saving-some-host-1234-0123abcd",
    ".qartsr-saving-some-host-1234-0123abcd.old",
    "run.json.tmp",
]


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    kept = ["model", "report", "state.pt", ".model.mine", "notes.tmp", ".git"]
    for name in LEFT_OVER + kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("large")
    (tmp_path / "report" / ".index.html.0123abcd.tmp").write_text("half")
    with FolderLock(tmp_path) as lock:
        job.start_folder(Order(RunArguments(), tmp_path), lock)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "run.json", ".lock"])
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["file"]


def test_a_run_begins_where_one_was_killed_before_it_had_begun(tmp_path):
    for name in (*LEFT_OVER, ".lock"):
        (tmp_path / name).write_text("{")
    assert arguments_of({"seed": 3}, tmp_path, resume=False).seed == 3
    with pytest.raises(ValueError, match="nothing to resume.*Begin the run without --resume"):
        arguments_of({}, tmp_path, resume=True)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        check_free(tmp_path)
    with pytest.raises(FileExistsError, match="photo.jpg is a file, not a folder"):
        check_free(tmp_path / "photo.jpg")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "The disk is full: free some space"),
        (errno.EROFS, "The disk is read-only: choose a folder on another disk"),
        (errno.EACCES, "Writing is not allowed there: change the permissions"),
        (errno.EIO, "Free some space, check the permissions, or choose another folder"),
    ],
)
def test_disks_that_cannot_be_written_to_are_explained(tmp_path, monkeypatch, number, said):
    def failing(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "run" / "file"))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", failing)
        with pytest.raises(SavingError, match=f"run cannot be made: {os.strerror(number)}. {said}"):
            quantize(build_tiny_pipeline(), output=tmp_path / "run", device="cpu")
    write_whole(tmp_path / "file", b"before")
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SavingError, match=f"The file that was saved before is untouched. {said}"):
        write_whole(tmp_path / "file", b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"before"


def test_errors_of_other_folders_stay_as_they_are(tmp_path):
    ours = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "run" / "report"))
    assert isinstance(run_folder.explained(ours, tmp_path / "run"), SavingError)
    for other in (
        PermissionError(errno.EACCES, "Permission denied", "/photographs/a.png"),
        OSError("no number"),
        OSError(2, "none"),
    ):
        assert run_folder.explained(other, tmp_path / "run") is other
    assert "a temporary file cannot be written" in str(run_folder.explained(OSError(errno.ENOSPC, "full"), tmp_path))


def test_temporary_names_are_new_each_time_and_known_as_left_over(tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(os, "replace", lambda source, target: names.append(Path(source).name))
    for _ in range(2):
        write_whole(tmp_path / "state.pt", b"")
    assert len(set(names)) == 2 and all(run_folder.LEFT_OVER.fullmatch(name) for name in names)


def test_no_flipped_byte_of_a_state_goes_unnoticed(tmp_path):
    """Whatever the byte, the state is refused or read as it was: torch.load by itself reads other numbers."""
    state = {"parameters": {f"layer.{number}": torch.randn(40) for number in range(4)}, "step": 7}
    save_tensors(tmp_path / "state.pt", state)
    whole, refused = (tmp_path / "state.pt").read_bytes(), 0
    for position in np.random.default_rng(0).permutation(len(whole))[:200]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(position) % 8
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            read = load_tensors(tmp_path / "damaged.pt", "a state", "restore it")
        except ValueError as error:
            refused += 1
            assert "damaged.pt cannot be read as a state" in str(error) and str(error).endswith(": restore it")
            continue
        assert read["step"] == 7
        assert all(torch.equal(tensor, read["parameters"][name]) for name, tensor in state["parameters"].items())
    assert refused > 50
