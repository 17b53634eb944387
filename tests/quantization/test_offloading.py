"""diffusers' offloading of a quantized pipeline: the same pictures, and nothing of what is offloaded stays behind.

The CPU is both devices here. That weights are really fetched shows where they are nowhere in between: on "meta" (sequential), in
a file (groups on disk).
"""

import accelerate
import numpy as np
import pytest
import torch
from group_offload import needs_group_offload
from quantized_models import deployed_layers, quantized_pipeline

from qartsr_pipeline import QArtSRPipeline

CPU = torch.device("cpu")
PHOTO = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    quantized_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(folder):
    """Loaded, and called once, so that backends have prepared weights."""
    pipeline = QArtSRPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    enlarge(pipeline)
    return pipeline


def enlarge(pipeline):
    return pipeline(PHOTO, tile_size=64, output_type="np", color_fix=None).images


def layers(pipeline):
    return [*deployed_layers(pipeline.unet).values(), *deployed_layers(pipeline.vae).values()]


def bytes_prepared(pipeline):
    return sum(layer.prepared.bytes for layer in layers(pipeline))


def enable(pipeline, kind, folder, monkeypatch):
    if kind == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    elif kind == "sequential":
        # diffusers asks for "cpu:0", which accelerate takes for another device than that of the weights
        offload = accelerate.cpu_offload
        monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: offload(model, CPU, **options))
        pipeline.enable_sequential_cpu_offload(device="cpu")
    else:
        disk = {"offload_to_disk_path": str(folder)} if kind == "blocks on disk" else {}
        pipeline.enable_group_offload(CPU, num_blocks_per_group=1, **disk)


BLOCKS = [pytest.param(kind, marks=needs_group_offload) for kind in ("blocks", "blocks on disk")]


@pytest.mark.parametrize("kind", ["model", "sequential", *BLOCKS])
def test_offloading_changes_no_picture_and_keeps_no_prepared_weights(pipeline, kind, tmp_path, monkeypatch):
    expected = enlarge(pipeline)
    assert bytes_prepared(pipeline) > 0
    enable(pipeline, kind, tmp_path / "disk", monkeypatch)
    for _ in range(2):
        assert np.array_equal(enlarge(pipeline), expected) and bytes_prepared(pipeline) == 0
    buffers = [buffer for layer in layers(pipeline) for buffer in layer.buffers()]
    assert all(buffer.is_meta == (kind == "sequential") for buffer in buffers)
    assert (tmp_path / "disk").exists() == (kind == "blocks on disk")
    if not kind.startswith("blocks"):
        pipeline.remove_all_hooks()
        assert np.array_equal(enlarge(pipeline), expected) and bytes_prepared(pipeline) > 0


@needs_group_offload
def test_groups_of_single_layers_need_tiles_without_common_statistics(pipeline, tmp_path):
    arguments = {"onload_device": CPU, "offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path / "disk")}
    with pytest.raises(ValueError, match="leaf_level.*group normalizations.*block_level.*share_tile_statistics"):
        pipeline.enable_group_offload(**arguments)
    pipeline.share_tile_statistics = False
    expected = enlarge(pipeline)
    pipeline.enable_group_offload(**arguments)
    assert np.array_equal(enlarge(pipeline), expected)


def test_what_another_model_left_on_disk_is_not_taken_for_this_one(pipeline, tmp_path):
    (tmp_path / "group_0.safetensors").write_bytes(b"another's")
    with pytest.raises(ValueError, match="is not empty.*Give an empty or a new folder"):
        pipeline.enable_group_offload(CPU, num_blocks_per_group=1, offload_to_disk_path=str(tmp_path))


@needs_group_offload
def test_streams_are_said_to_gain_nothing(pipeline, caplog):
    with pytest.raises(ValueError, match="use_stream=False"):  # diffusers' own, as a CPU has none
        pipeline.enable_group_offload(CPU, num_blocks_per_group=1, use_stream=True)
    assert "quantized layers, which have buffers, stay on the device" in caplog.text
