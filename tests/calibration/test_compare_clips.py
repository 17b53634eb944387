"""The comparison of methods on clips: what is made once, what is repeated, what the table says."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from calibration import compare_clips
from calibration.compare_clips import START, main, recipe_of
from qartsr_pipeline.calibration.recipe_files import load_recipe
from tiny_models import build_tiny_video_pipeline

COMMAND = ("--methods", "minmax", "smoothquant", START, "--seeds", "2", "--rank", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, clips to calibrate on, and others."""
    folder, rng = tmp_path_factory.mktemp("clips"), np.random.default_rng(0)
    build_tiny_video_pipeline().save_pretrained(folder / "model")
    for name in ("data/a", "data/b", "others/c"):
        (folder / name).mkdir(parents=True)
        for number in range(5):
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture
def few_images(monkeypatch):
    def recipe(*arguments):
        return replace(made(*arguments), images=10, image_size=64)

    made = compare_clips.recipe_of
    monkeypatch.setattr(compare_clips, "recipe_of", recipe)


def test_branches_of_all_methods_have_one_rank():
    assert {name: recipe_of(name, 8, None).layer.branch_rank for name in compare_clips.METHODS} == {
        **dict.fromkeys(("minmax", "smoothquant", "quarot", "vidit_q"), 0),
        **dict.fromkeys(("svdquant_token", "quantvsr", START, "lsgquant"), 8),
    }
    assert recipe_of("quantvsr", 8, None).layer.branch_budget == 0
    assert recipe_of(START, 8, 50).steps == 0 and recipe_of("lsgquant", 8, 50).steps == 50
    assert recipe_of("lsgquant", 8, None).steps == load_recipe("lsgquant").steps


def test_cells_are_made_once_and_ranked(folder, few_images, capsys, monkeypatch):
    command = [*map(str, (folder / "model", "--data", folder / "data", "--evaluate", folder / "others"))]
    command += [*COMMAND, "--output", str(folder / "out")]
    main(command)
    said = capsys.readouterr().out
    cells = {path.stem for path in (folder / "out" / "cells").iterdir()}
    assert cells == {f"{name}-w4a4-seed{seed}" for name in ("minmax", "smoothquant") for seed in (0, 1)} | {f"{START}-w4a4-seed0"}
    table = json.loads((folder / "out" / "comparison.json").read_text())
    means = [row["mean"]["psnr_y_to_full_precision"] for row in table["ranking"]["w4a4"]]
    assert means == sorted(means, reverse=True) and len(means) == 3
    assert "(2)" in said and not (folder / "out" / "runs").exists()

    monkeypatch.setattr(compare_clips, "quantize", None)  # whoever calls it fails
    main(command)
    assert capsys.readouterr().out.strip() == (folder / "out" / "comparison.md").read_text().strip()
    with pytest.raises(SystemExit):
        main([*command, "--rank", "3"])
    assert "was made with other settings, recipe.layer.branch_rank is 2 there and 3 here" in capsys.readouterr().err
    Image.new("RGB", (64, 64)).save(folder / "others" / "c" / "5.png")
    with pytest.raises(SystemExit):
        main(command)
    assert "was made with other settings, evaluation.count is 5 there and 6 here" in capsys.readouterr().err
