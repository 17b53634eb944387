"""Group normalization that is the same in all tiles of an image.

A group norm measures mean and variance over the whole feature map. Cut the image into tiles, and every tile has its own: a dark
tile is brightened, a flat one has its noise amplified, and neighbouring tiles differ in tone. Overlap and blending only hide
that. Here every tile is normalized with the image's statistics instead, which are estimated beforehand from a sample of it:

1. `SharedStatistics.record()`: the network runs on a batch of small windows spread over the image. Every group norm normalizes
   with statistics pooled over the whole batch, as if it were one image, and keeps them. Several such passes over different
   windows are merged.
2. `SharedStatistics.apply()`: every group norm uses the statistics it kept, and so becomes a fixed affine map per channel.

Both hold for the context that enters them alone: other threads that run the same networks see nothing of it.

The windows of a pass together have at most as many pixels as one tile, so that sampling needs no more memory than a tile does;
there is at most one pass for every four tiles. The rim of a window is not measured: there the network sees the zero padding
around the window, which the image does not have.

Measured on photographs with two small trained models (`benchmarks run seams`: 512 x 512 in tiles of 256, no colour alignment,
PSNR to the untiled result): with the exact statistics, tiles equal the whole image (104 dB), so the statistics are the only
cause of seams. With each tile's own statistics the result is 42 and 55 dB, with shared ones 53 and 62 dB. Counting the rims, the
second model falls to 53 dB. Smaller windows are worse, and windows of 16 pixels useless.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.forwards import exchanged_forwards
from qartsr_pipeline.image.tiles import Tile

SMALLEST_WINDOW = 64  # and at least 4 x the network's multiple: see above
RIM = 1 / 8  # share of a window's side that is not measured, at each end
TILES_PER_PASS = 4
MOST_PASSES = 8


def sample_windows(size: tuple[int, int], tile: int, multiple: int, tiles: int) -> list[list[Tile]]:
    """Batches of windows, one batch for each pass. The image is divided regularly; every part has its window in the centre.

    Args:
        size: (height, width) of the image, multiples of `multiple`.
        tile: side of the tiles; the windows of a batch together have at most as many pixels.
        multiple: the network's total down-sampling; windows start and end on multiples of it.
        tiles: how many tiles there are.
    """
    window = max(tile // 4, min(tile // 2, 8 * multiple), 4 * multiple, SMALLEST_WINDOW)
    window = min(tile, window) // multiple * multiple
    sides = [min(window, side) for side in size]
    per_pass = max(1, tile * tile // (sides[0] * sides[1]))
    passes = min(max(1, tiles // TILES_PER_PASS), MOST_PASSES)
    counts = _division(size, window, per_pass * passes)
    tops, lefts = (_centred(*axis, multiple) for axis in zip(size, sides, counts, strict=True))
    windows = [Tile(top, left, *sides) for top in tops for left in lefts]
    passes = -(-len(windows) // per_pass)
    return [windows[i::passes] for i in range(passes)]


def _division(size: tuple[int, int], window: int, budget: int) -> tuple[int, int]:
    """(rows, columns) of windows: as many as the budget allows and the image has room for, in parts as square as possible."""
    rows_most, columns_most = (-(-side // window) for side in size)
    candidates = [(rows, min(columns_most, budget // rows)) for rows in range(1, min(rows_most, budget) + 1)]
    return max(candidates, key=lambda c: (round(8 * c[0] * c[1] / budget), -abs(size[0] / c[0] - size[1] / c[1])))


def _centred(length: int, window: int, count: int, multiple: int) -> list[int]:
    """First pixels of `count` windows along an axis, each in the middle of its part."""
    starts = [(length * (2 * i + 1) // (2 * count) - window // 2) // multiple * multiple for i in range(count)]
    return sorted({min(max(start, 0), length - window) for start in starts})


class SharedStatistics:
    """Statistics of every `nn.GroupNorm` inside some modules, each called once per pass, as in diffusers' models.

    Args:
        modules: the networks whose group norms are meant.
        rim: share of every feature map's height and width that is not measured, at each end.
    """

    def __init__(self, modules: Iterable[nn.Module], rim: float = RIM):
        self.rim = rim
        self.norms = [norm for module in modules for norm in module.modules() if isinstance(norm, nn.GroupNorm)]
        self.recorded: list[dict[nn.GroupNorm, tuple[torch.Tensor, torch.Tensor]]] = []
        self.moments: dict[nn.GroupNorm, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def record(self) -> Iterator[None]:
        """Within this context the networks normalize a batch with its pooled statistics, which are kept. Enter it once a pass."""
        current: dict[nn.GroupNorm, tuple[torch.Tensor, torch.Tensor]] = {}

        def pooled_forward(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
            # A stage that is repeated in float32 overwrites what its first attempt recorded.
            current[norm] = pooled_moments(without_rim(x, self.rim), norm.num_groups)
            return normalize(x, *current[norm], norm.weight, norm.bias, norm.eps)

        with exchanged_forwards(self.norms, lambda norm: partial(pooled_forward, norm)):
            yield
        self.recorded.append(current)
        self.moments = {norm: merged_moments([one[norm] for one in self.recorded]) for norm in current}

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Within this context the networks normalize with the kept statistics; a norm that recorded none works as usual."""
        recorded = [norm for norm in self.norms if norm in self.moments]
        with exchanged_forwards(recorded, lambda norm: FixedNorm(norm, *self.moments[norm])):
            yield


class FixedNorm:
    """Replaces a group norm's forward: normalizes with given moments, float32 (C,) each."""

    def __init__(self, norm: nn.GroupNorm, mean: torch.Tensor, variance: torch.Tensor):
        self.norm, self.mean, self.variance = norm, mean, variance

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(x, self.mean, self.variance, self.norm.weight, self.norm.bias, self.norm.eps)

    def scale_shift(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor and the summand that normalize x (B, C, ...): float32 (B, C) each. Fused blocks ask for them."""
        moments = self.mean.to(x.device), self.variance.to(x.device)
        scale, shift = scale_shift(*moments, self.norm.weight, self.norm.bias, self.norm.eps)
        return scale.repeat(x.shape[0], 1), shift.repeat(x.shape[0], 1)


def merged_moments(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of the union of equally large samples, from the mean and variance of each."""
    means, variances = (torch.stack(moment) for moment in zip(*parts, strict=True))  # (parts, ...)
    mean = means.mean(0)
    return mean, variances.mean(0) + (means - mean).square().mean(0)


def without_rim(x: torch.Tensor, rim: float) -> torch.Tensor:
    """x (B, C, H, W) without this share of its height and width at each end; any other shape (attention's tokens) as it is."""
    if x.ndim != 4:
        return x
    top, left = (int(side * rim) for side in x.shape[-2:])
    return x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]


def pooled_moments(x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, float32, each (C,) with equal values within a group, over batch, space and the group's channels.

    Args:
        x: (B, C, ...), any float dtype.
    """
    channels = x.shape[1]
    # One by one, so that the float32 copy of a 16-bit map stays small.
    parts = [torch.var_mean(one.reshape(groups, -1).float(), dim=1, unbiased=False) for one in x]
    mean, variance = merged_moments([(mean, variance) for variance, mean in parts])  # each (groups,)
    per_group = channels // groups
    return mean.repeat_interleave(per_group), variance.repeat_interleave(per_group)


def normalize(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Group normalization of x (B, C, ...) with given float32 moments (C,), computed in float32 and returned in x's dtype.

    Args:
        weight, bias: (C,) of any float dtype, both or neither.
        eps: added to the variance.
    """
    mean, variance = mean.to(x.device), variance.to(x.device)
    if x.device.type in ("cpu", "cuda"):  # the backends whose batch norm takes float32 moments with a 16-bit input
        gamma, beta = (None if tensor is None else tensor.float() for tensor in (weight, bias))
        return F.batch_norm(x, mean, variance, gamma, beta, training=False, eps=eps)
    scale, shift = scale_shift(mean, variance, weight, bias, eps)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return torch.addcmul(shift.view(shape), x, scale.view(shape)).to(x.dtype)


def scale_shift(
    mean: torch.Tensor, variance: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalization of `normalize` as one factor and one summand a channel, float32 (C,) each."""
    scale = torch.rsqrt(variance + eps)
    if weight is None or bias is None:
        return scale, -mean * scale
    scale = scale * weight.float()
    return scale, bias.float() - mean * scale
