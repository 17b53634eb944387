"""OSEDiff's tiles, of the UNet and of the VAE. They differ from the pipeline's own (see image/tiles.py and one_step.py).

The UNet's: equal squares over the latent, one call each, averaged with Gaussian weights. They start at fixed steps, with the last
one moved back inside, and every tile has its own group normalization statistics.

The VAE's: all tiles go through the network side by side, and every group norm waits for all statistics. A tile's margin is cut
off, not blended; the variance is the mean of the tiles' variances, without the differences between their means; and attention
sees one tile only. They need about as much memory as the whole image, so their only use is to reproduce OSEDiff's results.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product

import torch
from diffusers.hooks import HookRegistry
from diffusers.models import AutoencoderKL
from torch import nn

from qartsr_pipeline.forwards import exchanged_forwards, own_forward
from qartsr_pipeline.image.tile_statistics import normalize, pooled_moments

VARIANCE = 0.01  # of the Gaussian, in units of the tile's side squared
ENCODER_MARGIN, DECODER_MARGIN = 32, 11  # pixels, latent elements: how far a tile reads beyond the part that it writes
STEP = 32  # the size of the VAE's tiles is a multiple of it, the smallest that needs no more tiles


def in_latent_tiles(
    function: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tile: int, overlap: int
) -> torch.Tensor:
    """`function` on tiles of `latents`, averaged; at once where the latent's area is at most that of a tile.

    OSEDiff averages the predicted noise. The step from it to z_H is the same affine map for every tile, so averaging z_H, what
    `function` gives, is the same.

    Args:
        function: (B, C, h, w) -> the same shape.
        latents: (B, C, h, w).
        tile: longest side of a tile; shorter where the latent is shorter.
        overlap: of neighbours; the last two of an axis may have more in common.

    Raises:
        ValueError: the overlap leaves no step from tile to tile.
    """
    height, width = latents.shape[-2:]
    if height * width <= tile * tile:
        return function(latents)
    tile = min(tile, height, width)
    if not 0 <= overlap < tile:
        raise ValueError(
            f"latent tiles of {tile} cannot overlap by {overlap}. Give an overlap from 0 to below that, or a larger image."
        )
    weights = gaussian_weights(tile).to(latents.device)
    result = torch.zeros(latents.shape, dtype=torch.float64, device=latents.device)
    total = torch.zeros((height, width), dtype=torch.float64, device=latents.device)
    for top in starts(height, tile, overlap):
        for left in starts(width, tile, overlap):
            window = (..., slice(top, top + tile), slice(left, left + tile))
            result[window] += function(latents[window]) * weights
            total[window] += weights
    return (result / total).to(latents.dtype)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """First elements of the tiles along an axis: steps of tile - overlap, the last tile ends with the axis."""
    count = 1 + max(0, -(-(length - tile) // (tile - overlap)))
    return [*(i * (tile - overlap) for i in range(count - 1)), length - tile]


def gaussian_weights(tile: int) -> torch.Tensor:
    """(tile, tile), float64. Centred on tile / 2 vertically and (tile - 1) / 2 horizontally, as in OSEDiff."""
    position = torch.arange(tile, dtype=torch.float64)

    def bell(centre: float) -> torch.Tensor:
        return torch.exp(-((position - centre) ** 2) / (2 * VARIANCE * tile**2))

    return bell(tile / 2)[:, None] * bell((tile - 1) / 2)[None, :]


@dataclass(frozen=True)
class Span:
    """One axis of a tile, in elements of the input: it reads from `start` to `stop`, and writes from `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """The tiles along an axis of `length` elements."""
    inside = max(0, length - 2 * margin)
    count = max(1, -(-inside // tile))
    step = -(-inside // (count * STEP)) * STEP
    found = []
    for number in range(count):
        first, last = margin + number * step, min(margin + (number + 1) * step, length)
        written = first if number else 0, last if last < length - margin else length
        found.append(Span(max(0, first - margin), min(length, last + margin), *written))
    return found


class CommonStatistics:
    """Runs a network on several tiles, each in a thread of its own, with group norms that use the statistics of all tiles.

    One thread runs at a time, until its next group norm, where it waits for the others.

    Args:
        tiles: their number.
        device: of the tiles.
    """

    def __init__(self, tiles: int, device: torch.device):
        kind = device.type
        self._autocast = partial(
            torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
        )
        self._all_arrived = threading.Barrier(tiles, action=self._merge)
        self._running = threading.Lock()
        self._own = threading.local()
        self._moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._common: tuple[torch.Tensor, torch.Tensor]  # mean and variance of the group norm that all threads have reached

    def run(self, network: Callable[[torch.Tensor], torch.Tensor], number: int, tile: torch.Tensor) -> torch.Tensor:
        """Runs the network on one tile. An error ends the other threads with `threading.BrokenBarrierError`."""
        self._own.number = number
        try:
            with self._running, torch.no_grad(), self._autocast():  # modes that each thread has of its own
                return network(tile)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Ends all threads at their next group norm."""
        self._all_arrived.abort()

    def normalized(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """``norm`` of one thread's x (B, C, ...), with the moments of all."""
        self._moments[self._own.number] = x[0, 0].numel(), *pooled_moments(x, norm.num_groups)
        affine = norm.weight, norm.bias  # offloading may have removed them when this thread goes on
        self._running.release()
        try:
            self._all_arrived.wait()
        finally:
            self._running.acquire()
        mean, variance = self._common
        return normalize(x, mean, variance, *affine, norm.eps)

    def _merge(self) -> None:
        in_order = (self._moments[number] for number in sorted(self._moments))  # so that every run rounds alike
        sizes, means, variances = zip(*in_order, strict=True)
        shares = [size / sum(sizes) for size in sizes]
        self._common = _weighted(means, shares), _weighted(variances, shares)
        self._moments.clear()


def _weighted(parts: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """The sum of the tensors, each times its weight."""
    return reduce(torch.add, (weight * part for weight, part in zip(weights, parts, strict=True)))


def in_tiles(
    network: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: int,
    margin: int,
    factor: tuple[int, int],
) -> torch.Tensor:
    """Runs ``forward``, of the VAE's encoder or decoder, on tiles of x, or on all of x if one tile with its margins holds it.

    Args:
        network: the module that ``forward`` runs.
        x: (1, C, H, W).
        tile: longest side of the part that a tile writes, in elements of x.
        factor: (8, 1) if the output's sides are 8 times x's, (1, 8) if they are an eighth.

    Raises:
        ValueError: the network's groups of layers are offloaded.
    """
    if max(x.shape[-2:]) <= tile + 2 * margin:
        return forward(x)
    norms: list[nn.Module] = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    if any(isinstance(vars(module).get("_diffusers_hook"), HookRegistry) for module in network.modules()):
        raise ValueError(
            "OSEDiff's tiles of the VAE do not work with group offloading, which removes weights when the first tile is done."
            " Give vae_encoder_tile=None and vae_decoder_tile=None, or use enable_model_cpu_offload()."
        )
    up, down = factor
    tiles = list(product(*(spans(side, tile, margin) for side in x.shape[-2:])))
    cut = [x[..., rows.start : rows.stop, columns.start : columns.stop] for rows, columns in tiles]
    common = CommonStatistics(len(tiles), x.device)

    def with_common_statistics(norm: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        assert isinstance(norm, nn.GroupNorm)
        return partial(common.normalized, norm)

    with exchanged_forwards(norms, with_common_statistics), ThreadPoolExecutor(len(tiles)) as threads:
        try:
            running = [threads.submit(copy_context().run, common.run, forward, number, part) for number, part in enumerate(cut)]
            errors = [error for error in (job.exception() for job in running) if error is not None]
        except BaseException:  # Ctrl-C, or no more threads: those that run would wait at the barrier for ever
            common.abort()
            raise
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))  # the cause, not a consequence
    parts = [job.result() for job in running]
    result = parts[0].new_empty(len(x), parts[0].shape[1], *(side * up // down for side in x.shape[-2:]))
    for part, axes in zip(parts, tiles, strict=True):
        (top, bottom), (left, right) = ((span.first * up // down, span.last * up // down) for span in axes)
        part_top, part_left = (span.start * up // down for span in axes)  # where the tile's own output begins
        written = part[..., top - part_top : bottom - part_top, left - part_left : right - part_left]
        result[..., top:bottom, left:right] = written
    return result


@contextmanager
def osediff_vae_tiles(vae: AutoencoderKL, factor: int, encoder_tile: int | None, decoder_tile: int | None) -> Iterator[None]:
    """While it is open, ``vae`` encodes and decodes in OSEDiff's tiles.

    Args:
        factor: how many times smaller than the image's sides the latent's are.
        encoder_tile, decoder_tile: in pixels and in latent elements. None: the whole image at once.

    Raises:
        ValueError: a tile is not a multiple of 32.
    """
    for name, tile in (("encoder", encoder_tile), ("decoder", decoder_tile)):
        if tile is not None and (tile < STEP or tile % STEP):
            raise ValueError(f"The tile of the VAE's {name} must be a multiple of {STEP}, or None, but is {tile!r}.")
    halves: tuple[tuple[nn.Module, int | None, int, tuple[int, int]], ...] = (
        (vae.encoder, encoder_tile, ENCODER_MARGIN, (1, factor)),
        (vae.decoder, decoder_tile, DECODER_MARGIN, (factor, 1)),
    )
    tiled = {half: (tile, margin, ratio) for half, tile, margin, ratio in halves if tile is not None}
    originals = {half: own_forward(half) for half in tiled}

    def forward(half: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return in_tiles(half, originals[half], x, *tiled[half])

    with exchanged_forwards(list(tiled), lambda half: partial(forward, half)):
        yield
