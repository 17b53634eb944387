"""`qartsr upscale` over many images: runs that continue where they stopped, the bar, and several processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qartsr_pipeline.cli import upscale_images
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.cli.processes import Processes, join_processes
from qartsr_pipeline.pipeline_qartsr import QArtSRPipeline


def draw(path, side=8):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path):
    """A folder with a.png to d.png."""
    for name in "abcd":
        draw(tmp_path / "photos" / f"{name}.png")
    return tmp_path / "photos"


@pytest.fixture
def upscale(tiny_folder):
    return lambda *arguments: main(["upscale", "--model", str(tiny_folder), *map(str, arguments)])


def count_calls(monkeypatch, stop_after=None):
    """The pipeline's calls, as a list that grows; from the given one on they are interrupted, as by Ctrl-C."""
    calls, call = [], QArtSRPipeline.__call__

    def counted(self, *arguments, **options):
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(arguments)
        return call(self, *arguments, **options)

    monkeypatch.setattr(QArtSRPipeline, "__call__", counted)
    return calls


def test_an_interrupted_run_continues_where_it_stopped(upscale, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        count_calls(patch, stop_after=2)
        assert upscale(photos, "-o", out) == 130
    first = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(path.name for path in first) == ["a_x4.png", "b_x4.png"]
    capsys.readouterr()
    calls = count_calls(monkeypatch)
    assert upscale(photos, "-o", out) == 0 and len(calls) == 2 and len(list(out.iterdir())) == 4
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    said = capsys.readouterr().out
    assert "2 of 4 images are skipped" in said and "--overwrite" in said and "4 images: 2 written, 2 skipped, 0 failed" in said
    assert upscale(photos, "-o", out, "--overwrite") == 0 and len(calls) == 6
    assert "skipped" not in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_disk_that_takes_two_names_for_one_loses_no_result(upscale, tmp_path, capsys, monkeypatch, overwrite):
    """As a memory card does, on which A.png and a.png have no room beside each other."""
    draw(tmp_path / "photos" / "A.png")
    draw(tmp_path / "photos" / "a.png", side=5)
    write, out = upscale_images.write_image, tmp_path / "out"

    def write_as_both(path, *arguments):
        notices = write(path, *arguments)
        os.link(path, path.with_name(path.name.swapcase().replace(".PNG", ".png").replace("X4", "x4")))
        return notices

    monkeypatch.setattr(upscale_images, "write_image", write_as_both)
    assert upscale(tmp_path / "photos", "-o", out, *overwrite) == 2
    said = capsys.readouterr()
    assert "a_x4.png is the same file as" in said.err and "2 images: 1 written, 1 failed" in said.out
    assert Image.open(out / "A_x4.png").size == (32, 32)


def test_a_finished_run_does_not_even_load_the_model(upscale, photos, capsys, monkeypatch):
    assert upscale(photos) == 0  # beside the images
    monkeypatch.setattr(QArtSRPipeline, "from_pretrained", None)
    assert upscale(photos) == 0 and "4 images: 0 written, 4 skipped, 0 failed" in capsys.readouterr().out


def test_images_named_one_by_one_are_resumed_too_but_one_alone_must_be_meant(upscale, photos, capsys):
    a, b = photos / "a.png", photos / "b.png"
    assert upscale(a) == 0 and upscale(a, b) == 0
    assert "2 images: 1 written, 1 skipped, 0 failed" in capsys.readouterr().out
    assert upscale(a) == 2 and "exists already. Add --overwrite" in capsys.readouterr().err


def test_two_images_for_one_output_are_an_error_in_every_run(upscale, photos, capsys):
    draw(photos / "a.jpg")
    for summary in ("5 images: 4 written, 1 failed", "5 images: 0 written, 4 skipped, 1 failed"):
        assert upscale(photos, "-o", photos / "out") == 2
        output = capsys.readouterr()
        assert summary in output.out and "Rename one of them" in output.err


def test_what_another_run_wrote_in_the_meantime_is_left_alone(upscale, photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    call = QArtSRPipeline.__call__

    def meanwhile(*arguments, **options):
        (out / "b_x4.png").write_bytes(b"another's")
        return call(*arguments, **options)

    monkeypatch.setattr(QArtSRPipeline, "__call__", meanwhile)
    assert upscale(photos, "-o", out) == 0 and (out / "b_x4.png").read_bytes() == b"another's"
    assert "4 images: 3 written, 1 skipped, 0 failed" in capsys.readouterr().out


def test_a_bar_counts_files_where_a_person_watches(upscale, photos, capsys, monkeypatch):
    assert upscale(photos, "-o", photos / "unwatched") == 0 and "images:" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    (photos / "b.png").write_text("no image")
    assert upscale(photos, "-o", photos / "watched") == 2
    error = capsys.readouterr().err
    assert "images: 100%" in error and "4/4" in error
    lines = error.replace("\r", "\n").splitlines()
    assert any(line.startswith("qartsr: error: ") for line in lines), "the bar and the message share no line"


def test_shares_are_disjoint_and_whole():
    items = [f"{number:02}" for number in range(11)]
    shares = [Processes(index, 3).share(items) for index in range(3)]
    assert sorted(sum(shares, [])) == items and {len(share) for share in shares} == {3, 4}


@pytest.mark.parametrize("variables", [{}, {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"PMI_SIZE": "4"}])
def test_a_process_that_was_not_launched_with_others_is_alone(monkeypatch, variables):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert join_processes("auto") == Processes()


def launch(*arguments):
    """`accelerate launch` with two processes, on the CPU where there is nothing else."""
    program = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    options = ["--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "qartsr_pipeline.cli"]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.run([*program, *options, *map(str, arguments)], capture_output=True, text=True, env=environment, cwd=root)


@pytest.mark.slow
def test_two_processes_share_a_folder_and_a_failure_of_one_does_not_stop_the_other(tiny_folder, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    draw(photos / "b.png", side=128)  # the second process is still at work when the first one has failed
    (photos / "a.png").write_text("no image")
    arguments = ["upscale", photos, "-o", out, "--model", tiny_folder, "--device", "cpu"]
    result = launch(*arguments)
    assert result.returncode != 0 and [path.name for path in out.iterdir()] == ["b_x4.png"], result
    assert result.stdout.count("2 images: 1 written, 1 failed") == 1 and result.stderr.count("not an image") == 1
    assert "process 1 of 2: device: cpu" in result.stdout and "process 2 of 2: device: cpu" in result.stdout
    for name in ("a", "c", "d"):
        draw(photos / f"{name}.png")
    result = launch(*arguments)
    assert result.returncode == 0 and len(list(out.iterdir())) == 4, result
    assert result.stdout.count("1 of 4 images are skipped") == 1 and "4 images: 3 written, 1 skipped" in result.stdout
    assert all(result.stdout.count(f"{name}.png -> ") == 1 for name in ("a", "c", "d"))
