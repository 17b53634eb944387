"""OSEDiff's tiles of the VAE: all go through the network side by side, and every group norm waits for the statistics of all.

Not what the pipeline does by default (see upscaling.py): here a tile's margin is cut off, not blended; the variance is the mean
of the tiles' own (what their means differ by is left out, as in OSEDiff); and attention sees one tile only. Memory is about that
of the whole picture, so there is no reason for these tiles but to get what OSEDiff gets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from diffusers import AutoencoderKL
from torch import nn

from qartsr_pipeline.image.tile_statistics import exchanged_forwards, normalize, own_forward, pooled_moments

ENCODER_MARGIN, DECODER_MARGIN = 32, 11  # pixels, latent elements: what a tile reads beyond what it writes
STEP = 32  # tiles are as small as their number allows, in such steps


@dataclass(frozen=True)
class Span:
    """One axis of a tile, in elements of the input: it reads from `start` to `stop`, and writes from `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


def spans(length: int, tile: int, margin: int) -> list[Span]:
    """The tiles along an axis of so many elements."""
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
    """Group norms of one network that works on several tiles, each in a thread, one thread at a time.

    Args:
        tiles: how many.
        device: that they are on.
    """

    def __init__(self, tiles: int, device: torch.device):
        kind = device.type
        self._autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        self._everyone = threading.Barrier(tiles, action=self._merge)
        self._turn = threading.Lock()
        self._own = threading.local()
        self._moments: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}

    def run(self, network: Callable[[torch.Tensor], torch.Tensor], number: int, tile: torch.Tensor) -> torch.Tensor:
        """One thread's work. An error here ends the others' with `threading.BrokenBarrierError`."""
        self._own.number = number
        try:
            with self._turn, torch.no_grad(), torch.autocast(**self._autocast):  # modes that every thread has for itself
                return network(tile)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Ends all threads at their next group norm."""
        self._everyone.abort()

    def normalized(self, norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        """``norm`` of one thread's x (B, C, ...), with the moments of all."""
        self._moments[self._own.number] = x[0, 0].numel(), *pooled_moments(x, norm.num_groups)
        affine = norm.weight, norm.bias  # when it is this thread's turn again, offloading may have taken them away
        self._turn.release()
        try:
            self._everyone.wait()
        finally:
            self._turn.acquire()
        return normalize(x, *self._common, *affine, norm.eps)

    def _merge(self) -> None:
        in_order = (self._moments[number] for number in sorted(self._moments))  # for the same rounding in every run
        sizes, means, variances = zip(*in_order, strict=True)
        shares = [size / sum(sizes) for size in sizes]
        self._common = tuple(sum(s * part for s, part in zip(shares, parts, strict=True)) for parts in (means, variances))
        self._moments.clear()


def in_tiles(
    network: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    tile: int,
    margin: int,
    factor: tuple[int, int],
) -> torch.Tensor:
    """``forward``, of the VAE's encoder or decoder, on tiles of x; at once where no side is longer than a tile with its margins.

    Args:
        network: the module that ``forward`` runs.
        x: (1, C, H, W).
        tile: longest side of what a tile writes, in elements of x.
        factor: (8, 1) if the output's sides are 8 times x's, (1, 8) if they are an eighth.

    Raises:
        ValueError: the network's groups of layers are offloaded.
    """
    if max(x.shape[-2:]) <= tile + 2 * margin:
        return forward(x)
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    if any(hasattr(module, "_diffusers_hook") for module in network.modules()):
        raise ValueError(
            "OSEDiff's tiles of the VAE do not work with group offloading, which takes weights away when the first tile is done."
            " Give vae_encoder_tile=None and vae_decoder_tile=None, or use enable_model_cpu_offload()."
        )
    up, down = factor
    tiles = list(product(*(spans(side, tile, margin) for side in x.shape[-2:])))
    cut = [x[..., rows.start : rows.stop, columns.start : columns.stop] for rows, columns in tiles]
    common = CommonStatistics(len(tiles), x.device)
    with exchanged_forwards(norms, lambda norm: partial(common.normalized, norm)), ThreadPoolExecutor(len(tiles)) as threads:
        try:
            running = [threads.submit(copy_context().run, common.run, forward, number, part) for number, part in enumerate(cut)]
            errors = [error for error in (job.exception() for job in running) if error is not None]
        except BaseException:  # Ctrl-C, or no more threads: nobody would come to the others' barrier
            common.abort()
            raise
    if errors:
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))  # the cause, not a consequence
    parts = [job.result() for job in running]
    result = parts[0].new_empty(len(x), parts[0].shape[1], *(side * up // down for side in x.shape[-2:]))
    for part, axes in zip(parts, tiles, strict=True):
        target = tuple(slice(span.first * up // down, span.last * up // down) for span in axes)
        begin = [window.start - span.start * up // down for window, span in zip(target, axes, strict=True)]
        source = tuple(slice(b, b + window.stop - window.start) for b, window in zip(begin, target, strict=True))
        result[(..., *target)] = part[(..., *source)]
    return result


@contextmanager
def osediff_vae_tiles(vae: AutoencoderKL, factor: int, encoder_tile: int | None, decoder_tile: int | None) -> Iterator[None]:
    """Within, ``vae`` encodes and decodes in OSEDiff's tiles.

    Args:
        factor: what the VAE divides the sides by.
        encoder_tile, decoder_tile: in pixels and in latent elements. None: the whole picture at once.

    Raises:
        ValueError: a tile is no multiple of 32.
    """
    for name, tile in (("encoder", encoder_tile), ("decoder", decoder_tile)):
        if tile is not None and (tile < STEP or tile % STEP):
            raise ValueError(f"The tile of the VAE's {name} must be a multiple of {STEP}, or None, but is {tile!r}.")
    halves = (
        (vae.encoder, encoder_tile, ENCODER_MARGIN, (1, factor)),
        (vae.decoder, decoder_tile, DECODER_MARGIN, (factor, 1)),
    )
    tiled = {half: (tile, margin, ratio) for half, tile, margin, ratio in halves if tile is not None}
    originals = {half: own_forward(half) for half in tiled}

    def forward(half: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return in_tiles(half, originals[half], x, *tiled[half])

    with exchanged_forwards(list(tiled), lambda half: partial(forward, half)):
        yield
