"""Memory is asked for before it is taken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qartsr_pipeline import bands, memory
from qartsr_pipeline.cli.main import main
from qartsr_pipeline.memory import Enlargement, NotEnoughMemory, _left_in_groups, check_memory, free_main_memory


def enlargement(height, width, scale=4, upscale=4, **others):
    return Enlargement(
        (height, width), (height * scale, width * scale), (round(height * upscale), round(width * upscale)), **others
    )


SIDES = st.integers(1, 20000)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.sampled_from([0.5, 1, 4, 16]), st.booleans(), st.integers(0, 2**36))
def test_what_the_message_says_would_fit_does(height, width, upscale, alpha, free):
    try:
        check_memory([enlargement(height, width, upscale=upscale, alpha=alpha)], free)
    except NotEnoughMemory as error:
        if "At most about " in str(error):
            fitting = str(error).split("At most about ")[1].split(" pixels")[0].split(" x ")
            check_memory([enlargement(int(fitting[1]), int(fitting[0]), upscale=upscale, alpha=alpha)], free)
        assert f"{width} x {height} pixels" in str(error) and "GB" in str(error)
    else:
        assert free >= 12 * height * width * max(16, upscale**2)


def test_the_images_of_a_call_count_together():
    one = enlargement(1000, 1000)
    check_memory([one], one.bytes())
    with pytest.raises(NotEnoughMemory, match="with 2 other images.*fewer images at once"):
        check_memory([one] * 3, one.bytes())
    check_memory([one] * 3, one.bytes() + 2 * one.kept())
    assert enlargement(1000, 1000, decoded=False).bytes() < one.bytes() / 1.5
    check_memory([], 0)


def group(root, path, limit, used, file, version):
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}[version]
    folder = root / "memory" / path if version == 1 else root / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"memory.{names[0]}").write_text(f"{limit}\n")
    (folder / f"memory.{names[1]}").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {file}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_control_groups_count_those_above_included(tmp_path, version):
    membership = tmp_path / "cgroup"
    membership.write_text("3:cpu,cpuacct:/other\n" + ("4:memory:/a/b\n" if version == 1 else "0::/a/b\n"))
    root = tmp_path / "fs"
    group(root, "a/b", 1000, 300, 100, version)
    group(root, "a", 500, 350, 50, version)
    if version == 2:
        group(root, "", "max", 10, 0, version)
    assert sorted(_left_in_groups(membership, root)) == [200, 800]


def test_without_control_groups_the_machine_decides(tmp_path, monkeypatch):
    membership = tmp_path / "cgroup"
    assert list(_left_in_groups(membership, tmp_path)) == []
    membership.write_text("0::/\n")
    assert list(_left_in_groups(membership, tmp_path)) == []
    assert free_main_memory() > 0


def test_a_call_that_would_not_fit_is_refused_before_the_network_runs(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(memory, "free_main_memory", lambda: 2 * 10**9)
    tiny_pipeline.unet.forward = tiny_pipeline.vae.encode = None
    with pytest.raises(MemoryError, match="2000 x 3000 pixels enlarged to 8000 x 12000 needs about .* At most about"):
        tiny_pipeline(np.zeros((3000, 2000, 3), np.uint8), tile_size=64)


def test_a_large_photograph_in_a_folder_is_refused_and_the_others_are_done(tiny_folder, tmp_path, capsys, monkeypatch):
    for module in (memory, bands):
        monkeypatch.setattr(module, "free_main_memory", lambda: 2 * 10**9)
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name, size in (("a", (8, 8)), ("m", (3000, 2000)), ("z", (8, 8))):
        Image.new("RGB", size).save(photos / f"{name}.png")
    for run in range(2):
        assert main(["upscale", "--model", str(tiny_folder), "--device", "cpu", str(photos), "-o", str(out)]) == 2
        said = capsys.readouterr()
        assert sorted(path.name for path in out.iterdir()) == ["a_x4.png", "z_x4.png"]
        assert "m.png: an image of 3000 x 2000 pixels" in said.err and "would fit" in said.err
        summary = said.out[said.out.index("3 images") :]
        assert ("2 written, 1 failed" if run == 0 else "0 written, 2 skipped, 1 failed") in summary
        assert "failed: " in summary and "m.png: an image of 3000" in summary and ("skipped: " in summary) == (run == 1)
