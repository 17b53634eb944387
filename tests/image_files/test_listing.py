"""Which images a folder gives, what becomes of the rest, and which file is written for which image."""

import io
import os
import sys
import types

import numpy as np
import pytest
from PIL import Image

from qartsr_pipeline.cli import jobs
from qartsr_pipeline.cli.jobs import OutputOptions, plan_jobs, sort_out
from qartsr_pipeline.cli.messages import UsageError, say
from qartsr_pipeline.image_files import ImageFileError, list_images, read_image, write_image
from qartsr_pipeline.image_files.reading import HEIF_SUFFIXES


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def planned(inputs, *options, recursive=False, upscale=4.0):
    """{name of the input: path of the result}, and what is left out."""
    found, left_out = plan_jobs([str(one) for one in inputs], upscale, OutputOptions(*options), recursive)
    return {job.source.name: job.target for job in found}, " ".join(left_out)


def test_everything_in_a_folder_is_an_image_or_is_named(tmp_path):
    images = ["a.JPG", "b.jfif", "c.jpe", "d.gif", "e.jp2", "f.tif", "g.png", "h.qoi"]
    touch(tmp_path, *images, "._a.JPG", ".hidden.png", "notes.txt", "raw.CR2", "none", "sub/i.png", "pipe.png")
    (tmp_path / "pipe.png").unlink()
    os.mkfifo(tmp_path / "pipe.png")
    listing = list_images(tmp_path)
    assert [path.name for path in listing.images] == images
    said = listing.left_out("; --recursive")
    for words in (
        "4 files of other kinds (1 without suffix, 1 .cr2, 1 .png, 1 .txt)",
        "2 hidden entries",
        "1 folder (sub; --recursive",
    ):
        assert words in said
    counted = len(listing.images) + sum(listing.others.values()) + len(listing.hidden) + len(listing.folders)
    assert counted == len(list(tmp_path.iterdir()))
    (tmp_path / "photo.heic").write_bytes(b"")
    assert bool(HEIF_SUFFIXES) != ("qartsr[heif]" in list_images(tmp_path).left_out())


def test_folders_within_folders_keep_their_places_and_results_are_not_searched(tmp_path):
    touch(tmp_path, "a.png", "x/b.png", "x/y/c.png", ".git/d.png", "out/old_x4.png")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found, left_out = planned([tmp_path], str(tmp_path / "out"), recursive=True)
    out = tmp_path / "out"
    assert found == {"a.png": out / "a_x4.png", "b.png": out / "x/b_x4.png", "c.png": out / "x/y/c_x4.png"}
    assert "1 hidden entry (.git)" in left_out and "1 folder (loop; links are not followed)" in left_out
    assert set(planned([tmp_path])[0]) == {"a.png"}


def draw(folder, **sides):
    """Images by name, `p_x4_png=8` becomes p_x4.png of 8 x 12 pixels."""
    for name, side in sides.items():
        Image.new("L", (side, side * 3 // 2)).save(folder / ".".join(name.rsplit("_", 1)).replace("_5.", ".5."))


def test_results_of_earlier_runs_are_left_out(tmp_path):
    draw(tmp_path, p_png=2, p_x4_png=8, q_png=2, q_x2_5_png=5, r_jpg=2, r_x4_jpg=8, r_x4_png=8, s_x4_png=8)
    Image.new("L", (12, 8)).save(tmp_path / "p_x4.png")  # of an original that lies on its side
    for inputs in ([tmp_path], sorted(tmp_path.iterdir()), [tmp_path / "*.*"]):
        for upscale in (4.0, 2.0):
            found, left_out = planned(inputs, upscale=upscale)
            # r_x4.jpg is not what a run writes for r.jpg unless --format same is given
            assert set(found) == {"p.png", "q.png", "r.jpg", "r_x4.jpg", "s_x4.png"}
            assert "p_x4.png and others are what earlier runs wrote" in left_out
    assert set(planned([tmp_path], None, "same")[0]) == {"p.png", "q.png", "r.jpg", "r_x4.png", "s_x4.png"}
    assert set(planned([tmp_path / "p_x4.png"])[0]) == {"p_x4.png"}, "alone it is meant"
    found, _ = plan_jobs([str(tmp_path / "p.png"), str(tmp_path / "p_x4.png")], 4.0, OutputOptions())
    plan = sort_out(found, overwrite=True)
    assert not plan.pending and "p_x4.png is another of the inputs, which would be lost" in plan.refusals[0]
    assert sort_out(found, overwrite=False).skipped == 1
    found, _ = plan_jobs([str(tmp_path)], 4.0, OutputOptions())
    assert "p.png" in {job.source.name for job in sort_out(found, overwrite=True).pending}, "found in the folder, not named"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_photograph_with_the_name_of_a_result_is_enlarged_and_not_replaced(tmp_path, overwrite):
    draw(tmp_path, p_png=2, p_x4_png=9, p_x2_png=2)
    for inputs in ([tmp_path], sorted(tmp_path.iterdir()), [tmp_path / "*.png"]):
        found, left_out = plan_jobs([str(one) for one in inputs], 4.0, OutputOptions())
        assert {job.source.name for job in found} == {"p.png", "p_x4.png", "p_x2.png"} and not left_out
        plan = sort_out(found, overwrite)
        assert {job.source.name for job in plan.pending} == {"p_x4.png", "p_x2.png"} and not plan.skipped
        assert "p_x4.png is another of the inputs, which would be lost" in plan.refusals[0]


def test_results_in_another_folder_are_left_out_where_they_are_found(tmp_path):
    for name in ("out", "in"):
        (tmp_path / name).mkdir()
    draw(tmp_path, p_png=2)
    draw(tmp_path / "in", p_png=3)
    draw(tmp_path / "out", p_x4_png=8, p_x2_png=5)
    found, left_out = plan_jobs([str(tmp_path)], 4.0, OutputOptions(), recursive=True)
    assert [job.source for job in found] == [tmp_path / "p.png", tmp_path / "in/p.png", tmp_path / "out/p_x2.png"]
    assert "out/p_x4.png is what an earlier run wrote" in " ".join(left_out)
    named = [tmp_path / "p.png", tmp_path / "out/p_x4.png"]
    assert [job.source for job in plan_jobs([str(one) for one in named], 4.0, OutputOptions())[0]] == named


def test_what_cannot_be_read_is_left_out_of_folders_and_never_where_it_is_named(tmp_path):
    touch(tmp_path, "p.png", "p_x4.png")
    assert set(planned([tmp_path])[0]) == {"p.png"}
    assert set(planned(sorted(tmp_path.iterdir()))[0]) == {"p.png", "p_x4.png"}, "so that it is called damaged"


def test_patterns_that_the_shell_has_left(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.txt", "[1].png")
    assert set(planned([tmp_path / "?.png"])[0]) == {"a.png", "b.png"}
    assert set(planned([tmp_path / "[1].png"])[0]) == {"[1].png"}, "a file's name is no pattern"
    assert set(planned([tmp_path / "a.png", tmp_path / "*.png"])[0]) == {"a.png", "b.png", "[1].png"}, "each once"
    with pytest.raises(UsageError, match="No file matches"):
        planned([tmp_path / "*.webp"])
    with pytest.raises(UsageError, match="holds no images .*1 .txt"):
        touch(tmp_path, "texts/d.txt")
        planned([tmp_path / "texts"])


def test_two_names_for_one_result(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg", "a.png", "B.png", "b.png")
    found, _ = plan_jobs([str(tmp_path)], 4.0, OutputOptions())
    (refusal,) = sort_out(found, overwrite=True).refusals
    assert f"{tmp_path / 'a.png'} would be written to" in refusal and "a.jpg before it" in refusal and "--format same" in refusal
    same, _ = plan_jobs([str(tmp_path)], 4.0, OutputOptions(None, "same"))
    assert sort_out(same, overwrite=True).refusals == []
    touch(tmp_path, "a.gif")
    same_gif, _ = plan_jobs([str(tmp_path)], 4.0, OutputOptions(None, "same"))
    assert "--format same" not in sort_out(same_gif, overwrite=True).refusals[0], "a GIF becomes a PNG all the same"
    (tmp_path / "a.gif").unlink()
    monkeypatch.setattr(jobs, "sys", types.SimpleNamespace(platform="darwin"))
    (refusal,) = sort_out(same, overwrite=True).refusals
    assert "b.png would be written to" in refusal, "file systems that do not tell B from b"


def test_a_name_that_is_too_long_stops_nothing_else(tmp_path):
    long = "z" * 251 + ".png"
    touch(tmp_path, "a.png", long)
    found, _ = plan_jobs([str(tmp_path)], 4.0, OutputOptions())
    plan = sort_out(found, overwrite=False)
    assert [job.source.name for job in plan.pending] == ["a.png"]
    assert "ame too long" in plan.refusals[0] and "Rename the image" in plan.refusals[0]


def test_a_result_may_have_the_longest_name_there_is(tmp_path):
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    target = tmp_path / ("写" * 83 + "ab.png")
    assert len(target.name.encode()) == 255
    write_image(target, np.zeros((2, 2, 3)), read_image(tmp_path / "a.png"))
    assert target.exists()
    with pytest.raises(ImageFileError, match="The name is too long for this folder: choose a shorter one"):
        write_image(tmp_path / ("写" * 84 + ".png"), np.zeros((2, 2, 3)), read_image(tmp_path / "a.png"))


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageFileError, match="is a pipe or a device"):
        read_image(tmp_path / "a.png")


def test_control_characters_of_names_do_nothing(capsys):
    say("a\nb\x1b[2J\x9b.png")
    assert capsys.readouterr().out == "a\\x0ab\\x1b[2J\\x9b.png\n"


@pytest.mark.parametrize(
    "encoding, shown", [("cp1252", "\\u65e5 é \\udce9"), ("utf-8", "日 é \\udce9"), ("ascii", "\\u65e5 \\xe9 \\udce9")]
)
def test_every_name_can_be_printed(monkeypatch, encoding, shown):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding=encoding, errors="strict"))
    say("日 é \udce9")
    assert buffer.getvalue().decode(encoding).splitlines() == [shown]


def test_a_program_without_a_console_prints_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    say("a line")


def test_colours_under_transparency_that_may_be_missed(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    for colours, hides in ((pixels, False), (np.random.default_rng(0).integers(0, 255, (4, 4, 4), np.uint8), True)):
        colours[..., 3] = [0, 0, 255, 255]
        Image.fromarray(colours).save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").hides_colors is hides
