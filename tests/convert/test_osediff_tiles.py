"""OSEDiff's tiles of the VAE, against its rule written out for a small network. Equality with OSEDiff's own class was also seen,
outside these tests: 6e-6 for latents, 4e-5 for pictures."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from group_offload import needs_group_offload
from torch import nn

from qartsr_pipeline.convert.osediff_tiles import ENCODER_MARGIN, Span, in_tiles, osediff_vae_tiles, spans
from qartsr_pipeline.kernels import forced_backend, low_memory, use_backend
from qartsr_pipeline.kernels.stored_layer import saves_memory


def small_vae(**options):
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**sizes, **blocks, **options).eval()


def photo(height, width):
    """Bright to dark, so that tiles differ."""
    torch.manual_seed(1)
    return torch.rand(1, 3, height, width) * torch.linspace(0, 1, width) + torch.linspace(-1, 0, height)[:, None]


def test_where_tiles_are():
    assert spans(1088, 1024, 32) == [Span(0, 1088, 0, 1088)]
    assert spans(1096, 1024, 32) == [Span(0, 608, 0, 576), Span(544, 1096, 576, 1096)]  # two of 544, not of 1024 and 8
    assert spans(300, 224, 11) == [Span(0, 182, 0, 171), Span(160, 300, 171, 300)]
    assert spans(20, 32, 11) == [Span(0, 20, 0, 20)], "shorter than its margins"
    for length in range(8, 700, 13):
        found = spans(length, 64, ENCODER_MARGIN)
        assert found[0].first == 0 and found[-1].last == length, length
        assert all(one.last == other.first for one, other in zip(found, found[1:], strict=False)), length
        assert all(0 <= span.start <= span.first < span.last <= span.stop <= length for span in found), length


def test_group_norms_use_the_means_of_all_tiles_moments():
    """The rule written out: the network layer by layer, every tile's moments, weighted by its size."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 5, 8, stride=8))
    nn.init.uniform_(network[1].weight)
    nn.init.uniform_(network[1].bias)
    x = photo(136, 200)
    reads = [(slice(*rows), slice(*columns)) for rows in ((0, 128), (64, 136)) for columns in ((0, 128), (64, 192), (128, 200))]
    hidden = [network[0](x[..., rows, columns]) for rows, columns in reads]
    groups = [h.view(2, -1) for h in hidden]
    total = sum(h.shape[1] for h in groups)
    mean = sum(h.mean(1) * h.shape[1] for h in groups) / total
    variance = sum(h.var(1, unbiased=False) * h.shape[1] for h in groups) / total  # not of the means: as OSEDiff
    expected = torch.zeros(1, 5, 17, 25)
    writes = [(rows, columns) for rows in ((0, 12), (12, 17)) for columns in ((0, 12), (12, 20), (20, 25))]
    for h, (rows, columns), (read_rows, read_columns) in zip(hidden, writes, reads, strict=True):
        normal = (h.view(2, -1) - mean[:, None]) / (variance[:, None] + network[1].eps).sqrt()
        y = network[3](F.silu(network[1].weight.view(1, -1, 1, 1) * normal.view_as(h) + network[1].bias.view(1, -1, 1, 1)))
        top, left = read_rows.start // 8, read_columns.start // 8
        part = y[..., rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        expected[..., slice(*rows), slice(*columns)] = part
    result = in_tiles(network, network.forward, x, 64, 32, (1, 8))
    assert torch.allclose(result, expected, atol=1e-5)
    assert "forward" not in network[1].__dict__, "the group norm is as before"


def test_small_pictures_are_not_cut():
    vae, x = small_vae(), photo(64, 128)
    with torch.no_grad(), osediff_vae_tiles(vae, 2, 64, None):
        tiled = vae.encode(x).latent_dist.mode()
    assert torch.equal(tiled, vae.encode(x).latent_dist.mode())
    assert "forward" not in vae.encoder.__dict__ and "forward" not in vae.decoder.__dict__


def test_an_error_in_one_tile_is_told_and_ends_the_others():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8))
    calls = []

    def forward(x):
        calls.append(x.shape)
        if len(calls) == 2:
            raise MemoryError("no room for this tile")
        return network(x)

    with pytest.raises(MemoryError, match="no room"):
        in_tiles(network, forward, photo(136, 200), 64, 32, (1, 1))
    assert network(photo(8, 8)).isfinite().all()


@pytest.mark.parametrize("tile", [0, 100, -32])
def test_a_tile_that_osediff_would_not_make(tile):
    with pytest.raises(ValueError, match=f"VAE's decoder must be a multiple of 32, or None, but is {tile}"):
        with osediff_vae_tiles(small_vae(), 2, None, tile):
            pass


def test_with_weights_offloaded_between_layers(tmp_path):
    """accelerate takes a group norm's weights away when its call ends, and others' calls have not ended yet."""
    from accelerate import cpu_offload

    vae, x = small_vae(), photo(96, 264)
    with torch.no_grad():
        with osediff_vae_tiles(vae, 2, 64, 32):
            expected = vae.decode(vae.encode(x).latent_dist.mode()).sample
        cpu_offload(vae, "cpu")
        with osediff_vae_tiles(vae, 2, 64, 32):
            result = vae.decode(vae.encode(x).latent_dist.mode()).sample
    assert torch.equal(result, expected)


def test_ctrl_c_ends_all_tiles(monkeypatch):
    """What the main thread raises while it waits has to reach the others, who wait for each other."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8))

    def interrupted(job, timeout=None):
        raise KeyboardInterrupt

    def forward(x):
        time.sleep(0.05)  # nobody is done before the interruption
        return network(x)

    monkeypatch.setattr(Future, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_tiles(network, forward, photo(136, 200), 64, 32, (1, 1))
    assert "forward" not in network[1].__dict__, "the threads have ended, and the group norm is as before"


def test_too_many_tiles_for_the_system_are_an_error(monkeypatch):
    network, start, started = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8)), threading.Thread.start, []

    def refuse(thread):
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        in_tiles(network, network.forward, photo(136, 200), 64, 32, (1, 1))


@needs_group_offload
def test_group_offloading_is_refused_with_the_way_out():
    vae = small_vae()
    vae.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    with torch.no_grad(), pytest.raises(ValueError, match="group offloading.*vae_encoder_tile=None"):
        with osediff_vae_tiles(vae, 2, 64, 32):
            vae.encode(photo(136, 200))


def test_the_choice_of_a_backend_reaches_the_tiles():
    seen, vae = set(), small_vae()
    vae.encoder.conv_in.register_forward_hook(lambda *_: seen.add((forced_backend(), saves_memory())))
    with osediff_vae_tiles(vae, 2, 64, 32), use_backend("reference"), low_memory(), torch.no_grad():
        vae.encode(photo(136, 200))
    assert seen == {("reference", True)}


def test_autocast_reaches_the_tiles():
    vae, x = small_vae(), photo(136, 200)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), osediff_vae_tiles(vae, 2, 64, 32):
        assert vae.encode(x).latent_dist.mode().dtype == torch.bfloat16
