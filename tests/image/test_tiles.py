"""Tiles cover every pixel, keep their overlap and alignment, and their weights add up to one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qartsr_pipeline.image.tiles import axis_positions, choose_tile_size, plan_tiles, ramp, tile_grid


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_weights_add_up_to_one_everywhere(data):
    multiple = data.draw(st.sampled_from([4, 16]))
    tile = multiple * data.draw(st.integers(2, 9))
    overlap = multiple * data.draw(st.integers(0, tile // multiple - 1))
    size = tuple(multiple * data.draw(st.integers(1, 30)) for _ in range(2))
    grid = tile_grid(size, tile, overlap, multiple)
    for shrink in (1, multiple // 2):
        total = torch.zeros(size[0] // shrink, size[1] // shrink)
        for one, window in zip(grid, grid.windows(shrink), strict=True):
            one.cut(total, shrink).add_(window)
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    for positions, needed, length in ((grid.tops, grid.tile_height, size[0]), (grid.lefts, grid.tile_width, size[1])):
        assert needed <= tile and all(position % multiple == 0 for position in positions)
        assert positions[-1] + needed == length
        assert all(b - a <= needed - overlap for a, b in zip(positions, positions[1:], strict=False))


def test_no_more_tiles_than_needed():
    assert axis_positions(1024, 512, 0, 16) == (512, (0, 512))
    assert axis_positions(1024, 512, 16, 16) == (352, (0, 336, 672))
    assert axis_positions(512, 512, 64, 16) == (512, (0,))
    assert axis_positions(1040, 1024, 64, 16) == (560, (0, 480))  # not two that are nearly the same


def test_a_tiles_rim_does_not_count_where_it_overlaps():
    weights = ramp(64)
    assert weights[:16].max() == 0 and weights[-16:].min() == 1
    assert torch.allclose(weights + weights.flip(0), torch.ones(64))


def test_one_tile_when_none_is_asked_for():
    grid = tile_grid((48, 80), None, 0, 16)
    assert len(grid) == 1 and (grid.tile_height, grid.tile_width) == (48, 80)
    assert torch.equal(next(grid.windows()), torch.ones(48, 80))


@pytest.mark.parametrize(
    "side, gigabytes, expected",
    [(512, 64, None), (1024, 64, None), (1040, 64, 1024), (1024, 1.9, 768), (4096, 1, 512), (4096, 0.2, 256), (4096, 0.001, 256)],
)
def test_automatic_size_follows_the_memory(side, gigabytes, expected):
    assert choose_tile_size((side, side), pixel_bytes=1024, memory=int(gigabytes * 2**30)) == expected


def test_what_is_asked_for_is_rounded_so_that_tiles_never_grow():
    plan = plan_tiles((1000, 1000), 130, 33, 16, 4, automatic=None)
    assert plan.grid.tile_height == 128 and plan.grid.height == 1008
    assert min(b - a for a, b in zip(plan.grid.tops, plan.grid.tops[1:], strict=False)) <= 128 - 48
    assert plan_tiles((1, 1), None, None, 16, 4, automatic=lambda size: None).grid.height == 128
    assert plan_tiles((1, 1), 64, 0, 16, 4, automatic=None).grid.height == 64
