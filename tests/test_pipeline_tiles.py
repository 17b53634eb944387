"""Tiles: the same image as untiled up to what the network sees at tile borders, in a memory bounded by the tile."""

import numpy as np
import pytest
import torch
from torch import nn

from qartsr_pipeline.image.tile_statistics import SharedStatistics, pooled_moments, sample_windows
from tiny_models import build_tiny_pipeline

SCENE = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SCENE = torch.nn.functional.interpolate(SCENE, size=(72, 100), mode="bicubic").clamp(0, 1)  # enlarged: 288 x 400
SCENE[..., 50:] *= 0.3  # one half dark, so that tiles differ in their statistics


def call(pipe, **arguments):
    return pipe(SCENE, output_type="np", color_fix=None, **arguments).images[0]


def without_attention(pipe):
    """Attention sees the whole tile, so that no overlap makes tiles exact."""
    for module in pipe.unet.modules():
        if type(module).__name__ in ("Transformer2DModel", "Attention"):
            module.forward = lambda hidden_states, *_, **__: (hidden_states,)
    for module in pipe.vae.modules():
        if type(module).__name__ == "Attention":
            module.forward = lambda hidden_states, *_, **__: hidden_states
    return pipe


def test_shared_statistics_bring_tiles_closer_to_the_whole_image():
    scene = torch.nn.functional.interpolate(SCENE, scale_factor=4)  # 288 x 400
    norm = nn.GroupNorm(1, 3)
    statistics = SharedStatistics([norm])
    for windows in sample_windows((288, 400), tile=128, multiple=4, tiles=12):
        with statistics.record():
            norm(torch.cat([window.cut(scene) for window in windows]))
    expected, tile = norm(scene)[..., :128, -128:], scene[..., :128, -128:]
    with statistics.apply():
        shared = (norm(tile) - expected).abs().mean()
    assert shared < 0.1 * (norm(tile) - expected).abs().mean()


def test_with_the_whole_images_statistics_tiles_are_exact(tiny_pipeline):
    pipe = without_attention(tiny_pipeline)
    whole = call(pipe)
    statistics = SharedStatistics([pipe.unet, pipe.vae], rim=0)
    with statistics.record():
        recorded = call(pipe)
    pipe.share_tile_statistics = False
    with statistics.apply():
        tiled = call(pipe, tile_size=256, tile_overlap=192)
    assert np.abs(recorded - whole).max() < 1e-5
    assert np.abs(tiled - whole).max() < 1e-3


@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_posterior_noise_does_not_depend_on_the_tiles(output_type):
    pipe = without_attention(build_tiny_pipeline())
    pipe.share_tile_statistics = False
    for norm in [m for part in (pipe.vae, pipe.unet) for m in part.modules() if isinstance(m, nn.GroupNorm)]:
        norm.forward = lambda x: x  # no statistics at all: only the noise can differ

    def sampled(**arguments):
        generator = torch.Generator().manual_seed(0)
        arguments |= {"sample_posterior": True, "generator": generator, "output_type": output_type, "color_fix": None}
        return torch.as_tensor(pipe(SCENE, **arguments).images)

    whole, tiled = sampled(), sampled(tile_size=256, tile_overlap=192)
    scale = (whole - whole.mean()).abs().mean()
    assert (tiled - whole).abs().max() < 1e-3 * scale


def largest_tensor(pipe, side, **arguments) -> int:
    """Elements of the largest tensor that any module of the network returns."""
    largest, hooks = 0, []

    def hook(_, __, output):
        nonlocal largest
        for tensor in output if isinstance(output, tuple) else (output,):
            largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)

    for module in [m for part in (pipe.vae, pipe.unet) for m in part.modules()]:
        hooks.append(module.register_forward_hook(hook))
    pipe(np.zeros((side, side, 3), np.uint8), **arguments)
    for one in hooks:
        one.remove()
    return largest


def test_memory_depends_on_the_tile_and_not_on_the_image(tiny_pipeline):
    one_tile = largest_tensor(tiny_pipeline, 32, tile_size=128)
    assert largest_tensor(tiny_pipeline, 60, tile_size=128) == one_tile
    assert largest_tensor(tiny_pipeline, 60) > 3 * one_tile


def test_the_automatic_choice_respects_the_memory(tiny_pipeline, monkeypatch):
    steps = []
    for free in (2**34, 2**24):
        monkeypatch.setattr("qartsr_pipeline.image.tiles.free_memory", lambda device, free=free: free)
        tiny_pipeline(np.zeros((16, 70, 3), np.uint8))
        steps.append(tiny_pipeline.num_timesteps)
    assert steps[0] == 1 and steps[1] > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [True, False])
def test_pooled_statistics_equal_those_of_one_large_map(dtype, affine):
    norm = nn.GroupNorm(2, 6, affine=affine).to(dtype)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = (torch.randn(4, 6, 8, 8) * torch.arange(1, 5).view(4, 1, 1, 1) + 3).to(dtype)
    joined = torch.cat(list(x), dim=-1)[None]  # the batch side by side as one image
    expected = torch.stack(norm.float()(joined.float())[0].chunk(4, dim=-1))
    norm.to(dtype)
    statistics = SharedStatistics([norm], rim=0)
    with statistics.record():
        recorded = norm(x)
    with statistics.apply():
        applied = torch.cat([norm(one[None]) for one in x])
    assert recorded.dtype == applied.dtype == dtype and torch.equal(recorded, applied)
    assert (recorded.float() - expected).abs().max() < {torch.float32: 1e-5}.get(dtype, 0.05)
    assert pooled_moments(x, 2)[0].shape == (6,)


def test_several_passes_count_as_one_sample_and_rims_do_not_count():
    norm, x = nn.GroupNorm(2, 6), torch.randn(4, 6, 16, 16) * torch.arange(1, 5).view(4, 1, 1, 1)
    together, apart = SharedStatistics([norm]), SharedStatistics([norm])
    with together.record():
        norm(x)
    x[..., :2, :], x[..., -2:] = 100, -100
    for part in x.split(2):
        with apart.record():
            norm(part)
    for one, other in zip(together.moments[norm], apart.moments[norm], strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_forwards_are_always_restored(tiny_pipeline):
    encoder = tiny_pipeline.vae.encoder
    norms = [module for module in encoder.modules() if isinstance(module, nn.GroupNorm)]
    statistics = SharedStatistics([encoder])
    with torch.no_grad(), statistics.record():
        encoder(torch.rand(1, 3, 16, 16))
    for context in (statistics.record, statistics.apply):
        with pytest.raises(RuntimeError, match="inside"), context():
            assert all("forward" in norm.__dict__ for norm in norms)
            raise RuntimeError("inside")
        assert not any("forward" in norm.__dict__ for norm in norms)


@pytest.mark.parametrize("size", [(64, 64), (64, 4096), (1008, 720), (2048, 2048), (4096, 128)])
@pytest.mark.parametrize("tile, tiles", [(64, 2), (256, 9), (512, 1000)])
def test_sample_windows_lie_inside_and_need_no_more_than_a_tile(size, tile, tiles):
    batches = sample_windows(size, tile, 16, tiles)
    assert 1 <= len(batches) <= max(1, tiles // 4)
    for windows in batches:
        assert 0 < sum(w.height * w.width for w in windows) <= tile * tile
    windows = [w for batch in batches for w in batch]
    assert len({(w.top, w.left) for w in windows}) == len(windows)
    for w in windows:
        assert w.top % 16 == w.left % 16 == w.height % 16 == w.width % 16 == 0
        assert w.top + w.height <= size[0] and w.left + w.width <= size[1]
