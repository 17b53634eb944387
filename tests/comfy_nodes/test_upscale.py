"""QArtSR Upscale: the result and its size, memory, cancel, the blend with the original, and what it says and shows."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from qartsr_pipeline import QArtSRPipeline


def run(nodes, model, image, mask=None, **changes):
    """The node's output; options of older workflows, which do not know the others, unless `changes` has them."""
    options = {"scale": 4.0, "long_side": 0, "tile_size": 0, "tile_overlap": 0, "color_fix": "wavelet"}
    options |= {"sample_posterior": False, "seed": 0} | changes
    return nodes["QArtSRUpscale"].execute(model=model, image=image, mask=mask, **options)


def upscale(*arguments, **changes):
    """The enlarged images, and their masks."""
    return run(*arguments, **changes).args


def test_the_output_is_the_pipelines_image_by_image(nodes, model, comfy, tiny_folder):
    images = torch.rand(2, 40, 24, 3)
    mask = torch.zeros(2, 40, 24)
    mask[1, :20] = 1
    result, transparency = upscale(nodes, model, images, mask, scale=2.5, tile_size=64, sample_posterior=True, seed=7)
    assert result.shape == (2, 100, 60, 3) and transparency.shape == (2, 100, 60)
    pipe = QArtSRPipeline.from_pretrained(tiny_folder)
    images = [images[0].permute(2, 0, 1), torch.cat([images[1].permute(2, 0, 1), 1 - mask[1:2]])]
    options = {"upscale": 2.5, "tile_size": 64, "sample_posterior": True, "generator": torch.Generator().manual_seed(7)}
    expected = pipe(images, output_type="pt", **options).images
    torch.testing.assert_close(result, torch.stack([one[:3].permute(1, 2, 0) for one in expected]), atol=1e-5, rtol=0)
    torch.testing.assert_close(transparency[1], 1 - expected[1][3])
    assert not transparency[0].any()
    values, totals, previews = zip(*comfy.progress, strict=True)
    assert list(values) == list(range(1, totals[0] + 1)) and set(totals) == {len(values)}
    assert previews[0][1].size == previews[-1][1].size == (60, 100), "ComfyUI writes the preview's size below it"


def test_long_side_and_one_pixel(nodes, model):
    assert upscale(nodes, model, torch.rand(1, 30, 50, 3), long_side=173)[0].shape == (1, 104, 173, 3)
    assert upscale(nodes, model, torch.rand(1, 1, 1, 3))[0].shape == (1, 4, 4, 3)


def test_cancel_stops_between_layers_and_leaves_nothing(nodes, model, comfy):
    image = torch.rand(1, 32, 32, 3)
    before = upscale(nodes, model, image)[0]
    comfy.cancel_at = comfy.looked + 20
    with pytest.raises(Exception) as raised:
        upscale(nodes, model, image)
    assert type(raised.value).__name__ == "InterruptProcessingException"
    assert comfy.looked == comfy.cancel_at + 1
    comfy.cancel_at = None
    assert not any(module._forward_pre_hooks for module in model.patcher.model.modules())
    assert torch.equal(upscale(nodes, model, image)[0], before)


def test_bad_input_is_explained(nodes, model):
    image = torch.rand(3, 16, 16, 3)
    with pytest.raises(ValueError, match="2 masks for 3 images"):
        upscale(nodes, model, image, torch.zeros(2, 16, 16))
    with pytest.raises(ValueError, match="is not possible: choose long_side up to 128"):
        upscale(nodes, model, image, long_side=4000)
    with pytest.raises(MemoryError, match="smaller size"):
        upscale(nodes, model, torch.zeros(1).expand(1, 200_000, 200_000, 3))
    image[1, 3, 3, 0] = float("nan")
    with pytest.raises(ValueError, match="image 2 of 3: .*NaN"):
        upscale(nodes, model, image)
    with pytest.raises(ValueError, match="image has 2 channels"):
        upscale(nodes, model, image[..., :2])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
@pytest.mark.parametrize(
    "automatic, overlap, expected", [(None, 0, [None, 512, 256]), (None, 300, [None, 512]), (256, 0, [None])]
)
def test_smaller_tiles_are_tried_when_memory_runs_out(nodes, model, monkeypatch, error, automatic, overlap, expected):
    tried = []

    def full(self, image, **options):
        tried.append(options["tile_size"])
        raise error

    monkeypatch.setattr(QArtSRPipeline, "__call__", full)
    monkeypatch.setattr("qartsr_pipeline.image.tiles.choose_tile_size", lambda *_: automatic)
    with pytest.raises(MemoryError, match="smaller tile_size"):
        upscale(nodes, model, torch.rand(1, 200, 200, 3), tile_overlap=overlap)
    assert tried == expected


def test_the_draw_is_the_same_after_memory_ran_out(nodes, model, monkeypatch):
    image, call, failures = torch.rand(2, 16, 16, 3), QArtSRPipeline.__call__, [1]
    expected = upscale(nodes, model, image, sample_posterior=True, seed=3)[0]

    def full_once(self, image, **options):
        result = call(self, image, **options)
        if failures:
            raise torch.OutOfMemoryError(str(failures.pop()))
        return result

    monkeypatch.setattr(QArtSRPipeline, "__call__", full_once)
    monkeypatch.setattr("comfy_nodes.upscale_batch.automatic_tile", lambda *_: 1024)
    assert torch.equal(upscale(nodes, model, image, sample_posterior=True, seed=3)[0], expected)


def test_errors_that_are_not_of_memory_are_told_as_they_are(nodes, model, monkeypatch):
    def broken(self, image, **options):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(QArtSRPipeline, "__call__", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        upscale(nodes, model, torch.rand(1, 16, 16, 3))


def test_the_preview_of_a_large_result_is_reduced_and_not_shown_for_every_tile(nodes, model, comfy, monkeypatch):
    monkeypatch.setattr("comfy_nodes.progress.LARGEST_PREVIEW", 32 * 32)
    monkeypatch.setattr("comfy_nodes.progress.EVERY", 3600)
    upscale(nodes, model, torch.rand(1, 32, 32, 3), tile_size=64)
    previews = [preview for _, _, preview in comfy.progress]
    assert len(previews) > 2 and previews[0][1].size == previews[-1][1].size == (32, 32) and set(previews[1:-1]) == {None}
    upscale(nodes, model, torch.rand(1, 1, 1, 3))
    upscale(nodes, model, torch.rand(1, 2, 90, 3), tile_size=128)


@pytest.mark.parametrize(
    "inputs, size",
    [
        ({}, (120, 200)),
        ({"scale": 1.5}, (45, 75)),
        ({"scale": 1.5, "long_side": 173}, (104, 173)),
        ({"size": "x2", "long_side": 173}, (60, 100)),
        ({"size": "x4", "scale": 2.0}, (120, 200)),
        ({"size": "long side", "side": 101, "long_side": 173}, (61, 101)),
        ({"size": "short side", "side": 101}, (101, 168)),
        ({"size": "megapixels", "megapixels": 0.01}, (79, 132)),
        ({"size": "long side", "side": 20}, (12, 20)),
        ({"long_side": 20}, (12, 20)),
    ],
)
def test_each_way_to_give_a_size(comfy, inputs, size):
    from comfy_nodes.target_size import Sizing
    from qartsr_pipeline.image.resize import enlarged_size

    assert enlarged_size((30, 50), Sizing(**inputs).factor((30, 50))) == size


@pytest.mark.parametrize(
    "inputs, possible",
    [
        ({"size": "long side", "side": 4000}, "at most 400 pixels"),
        ({"size": "short side", "side": 4000}, "at most 240 pixels"),
        ({"size": "megapixels", "megapixels": 1.0}, "at most 0.09 megapixels"),
        ({"long_side": 4000}, "long_side up to 400"),
        ({"size": "huge"}, "x2, x4, long side"),
    ],
)
def test_what_is_too_large_is_refused_with_what_is_possible(comfy, inputs, possible):
    from comfy_nodes.target_size import Sizing

    with pytest.raises(ValueError, match=possible):
        Sizing(**inputs).factor((30, 50))


def test_a_target_below_the_image_is_resampled_without_the_model_and_said(nodes, model, monkeypatch):
    def never(self, image, **options):
        raise AssertionError("the model is not needed")

    monkeypatch.setattr(QArtSRPipeline, "__call__", never)
    mask = torch.zeros(1, 40, 80)
    mask[:, :, 40:] = 1
    image = torch.zeros(1, 40, 80, 3) + torch.tensor([0.2, 0.5, 0.8])
    image[:, :, 40:] = 0  # what is transparent must not darken the edge
    output = run(nodes, model, image, mask, size="long side", side=20)
    result, transparency = output.args
    assert result.shape == (1, 10, 20, 3) and transparency.shape == (1, 10, 20)
    torch.testing.assert_close(result[0, 5, :10], torch.tensor([0.2, 0.5, 0.8]).expand(10, 3), atol=1e-3, rtol=0)
    assert float(transparency[0, 5, 2]) == 0 and float(transparency[0, 5, 17]) == 1
    assert (
        "20 x 10 from 80 x 40 (long side 20), smaller than the image: resampled, the model was not used" in output.ui["text"][0]
    )


def test_fidelity_is_the_pipelines(nodes, model, tiny_folder):
    image = torch.rand(1, 12, 10, 3)
    pipe = QArtSRPipeline.from_pretrained(tiny_folder)
    expected = pipe(image.permute(0, 3, 1, 2), fidelity=0.3, output_type="pt").images
    result = run(nodes, model, image, fidelity=0.3).args[0]
    torch.testing.assert_close(result.permute(0, 3, 1, 2), expected, atol=1e-6, rtol=0)
    assert (result - run(nodes, model, image).args[0]).abs().max() > 0.01


def test_the_line_after_a_run(nodes, model):
    output = run(nodes, model, torch.rand(2, 40, 24, 3), tile_size=64, size="x4")
    expected = r"2 images, 96 x 160 from 24 x 40 \(x4\), \d+ tiles of 56 x 64 each, \d+\.\d s, main memory at most \d+\.\d GB,"
    assert re.fullmatch(expected + " full precision", output.ui["text"][0])
    assert "1 tile, " in run(nodes, model, torch.rand(1, 4, 4, 3)).ui["text"][0]


def test_before_and_after_are_kept_as_small_files_of_one_size(nodes, model, tmp_path, monkeypatch):
    monkeypatch.setattr("comfy_nodes.run_summary.LONGEST", 60)
    monkeypatch.setattr("comfy_nodes.run_summary.KEPT", 2)
    image, mask = torch.full((1, 40, 24, 3), 0.9), torch.zeros(1, 40, 24)
    mask[:, :20] = 1
    (older,) = run(nodes, model, image).ui["qartsr_pair"]
    (pair,) = run(nodes, model, image, mask).ui["qartsr_pair"]
    assert {path.name for path in Path(tmp_path / "temp").iterdir()} == set(pair.values()) != set(older.values())
    for name in ("before", "after"):
        shown = Image.open(tmp_path / "temp" / pair[name])
        assert shown.size == (36, 60) and shown.getpixel((18, 5))[1] < 60 < 180 < shown.getpixel((18, 55))[1]


def test_samples_are_copied_once(nodes, tmp_path):
    from comfy_nodes.installation import copy_samples

    rider = tmp_path / "input" / "qartsr_rider.png"
    assert rider.is_file() and (tmp_path / "input" / "qartsr_batch" / "left.png").is_file()
    rider.unlink()
    copy_samples()
    assert not rider.exists()
    clip = tmp_path / "input" / "qartsr_flower.mp4"
    clip.unlink()
    (tmp_path / "user" / "qartsr_samples_copied").write_text("")  # as a version with images alone left it
    copy_samples()
    assert clip.is_file() and not rider.exists()


def test_nodes_of_others_take_the_model(nodes, comfy, tiny_folder):
    """As core's Upscale Image (using Model) does: bytes, device, a call for each tile, and `cpu` at the end."""
    import folder_paths

    shutil.copytree(tiny_folder, Path(folder_paths.models_dir) / "qartsr" / "base")
    node = nodes["QArtSRLoadModel"]
    assert [output.io_type for output in node.define_schema().outputs] == ["QARTSR_MODEL", "UPSCALE_MODEL"]
    loaded, upscale_model = node.execute(model="base", hub_id="", backend="auto", dtype="auto").args
    assert sum(tensor.numel() for tensor in upscale_model.model.state_dict().values()) > 1000 and upscale_model.scale == 4
    image = torch.rand(2, 12, 10, 3)
    upscale_model.to(torch.device("cpu"))
    result = upscale_model(image.movedim(-1, -3))
    assert torch.equal(result.movedim(-3, -1), upscale(nodes, loaded, image)[0])
    grey, clear = torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    rgb = grey.expand(1, 3, 8, 8)
    assert (
        torch.equal(upscale_model(grey), upscale_model(torch.cat([rgb, clear], 1)))
        and upscale_model(grey.half()).dtype == torch.half
    )
    # newer versions of core, and nodes of others
    assert upscale_model.patcher is loaded.patcher and upscale_model.device == upscale_model.patcher.load_device
    assert upscale_model.cpu() is upscale_model.eval() is upscale_model.to(dtype=torch.half) is upscale_model
    assert not upscale_model.supports_half and upscale_model.input_channels == upscale_model.output_channels == 3
    dtypes = [tensor.dtype for tensor in upscale_model.model.state_dict().values()]
    upscale_model.model.to(torch.device("cpu"), torch.half).half()  # would round the scales of quantized layers
    assert dtypes == [tensor.dtype for tensor in upscale_model.model.state_dict().values()]
    comfy.cancel_at = comfy.looked
    with pytest.raises(Exception) as raised:
        upscale_model(rgb)
    assert type(raised.value).__name__ == "InterruptProcessingException"
