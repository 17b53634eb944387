"""Procedural images with the statistics of photographs: leaves that cover each other.

After Achddou, Gousseau and Ladjal, "Synthetic images as a regularity prior for image restoration neural networks" (2021): shapes
with radii of density r^-3 occlude one another, which gives edges at every scale and the spectrum of photographs (power falling
with the square of the frequency). Leaves have natural colours, shading, and some of them 1/f noise or stripes.

Everything is drawn at twice the size: first a map of the leaf that is visible at each pixel, then all leaves are coloured at
once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from qartsr_pipeline.calibration.data.degradations import gaussian_blur

SUPERSAMPLING = 2  # drawn this many times larger and averaged, so that edges are antialiased
FIELD_SIDE = 512  # of the noise fields, which repeat seamlessly
MOST_LEAVES = 3000
VERTICES = 20  # of the polygons that approximate rotated ellipses
GREY, WARM, GREEN = np.array([[1, 1, 1], [1.0, 0.05, -1.05], [-0.45, 0.9, -0.45]], np.float32)  # axes of natural colours


@dataclass(frozen=True)
class Leaves:
    """The leaves of one image; the first is the background. Lengths are in pixels of the enlarged drawing.

    Attributes:
        seen: (side, side) int32, the number of the leaf that is visible.
        radius, x, y: (leaves,) float32.
    """

    seen: np.ndarray
    radius: np.ndarray
    x: np.ndarray
    y: np.ndarray


class DeadLeaves:
    """Endless procedural patches, with the interface of `patches.Patches`."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.fields = [noise_field(FIELD_SIDE, exponent, rng) for exponent in (1.0, 1.5, 2.0, 2.5)]

    def sample(self, count: int, size: int, rng: np.random.Generator) -> torch.Tensor:
        """``count`` patches, float32 in [0, 1], shape (count, 3, size, size); the same for the same state of ``rng``."""
        return torch.stack([self._patch(size, rng) for _ in range(count)])

    def _patch(self, size: int, rng: np.random.Generator) -> torch.Tensor:
        leaves = draw_leaves(size * SUPERSAMPLING, rng)
        image = self._paint(leaves, rng)
        patch = F.avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None], SUPERSAMPLING)
        # the lens: mostly sharp, now and then out of focus
        sigma = rng.uniform(0.8, 2.5) if rng.random() < 0.1 else rng.uniform(0.0, 0.5)
        return gaussian_blur(patch.contiguous(), sigma)[0].clamp_(0, 1)

    def _paint(self, leaves: Leaves, rng: np.random.Generator) -> np.ndarray:
        """(side, side, 3) float32: colour, shading and texture of the visible leaves."""
        count, side = len(leaves.radius), leaves.seen.shape[0]
        colours, seen = leaf_colours(count, rng), leaves.seen
        slope = rng.normal(0, 0.2, (2, count)).astype(np.float32) / np.minimum(leaves.radius, side)
        rows, columns = np.arange(side, dtype=np.float32)[:, None], np.arange(side, dtype=np.float32)[None]
        light = slope[0][seen] * columns + slope[1][seen] * rows - (slope[0] * leaves.x + slope[1] * leaves.y)[seen]
        light += 0.04 * self._field(side, 3, rng)  # uneven illumination of the scene
        rough = np.where(rng.random(count) < 0.6, rng.exponential(0.06, count), 0).astype(np.float32)
        light += rough[seen] * self._field(side, int(rng.integers(len(self.fields))), rng)
        add_stripes(light, leaves, rng)
        return colours[seen] + light[..., None] * (GREY + rng.normal(0, 0.1, 3).astype(np.float32))

    def _field(self, side: int, index: int, rng: np.random.Generator) -> np.ndarray:
        top, left = rng.integers(FIELD_SIDE, size=2)
        rows, columns = (start + np.arange(side) for start in (top, left))
        return self.fields[index].take(rows % FIELD_SIDE, 0).take(columns % FIELD_SIDE, 1)


def noise_field(side: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise whose power falls with the frequency to ``exponent``: (side, side) float32, mean 0, variance 1, periodic."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((side, side))) * frequency ** (-exponent / 2), s=(side, side))
    return (field / field.std()).astype(np.float32)


def power_law_radii(count: int, smallest: float, largest: float, rng: np.random.Generator) -> np.ndarray:
    """Radii of density r^-3 between the two bounds, (count,) float32."""
    u = rng.random(count)
    return ((smallest**-2 + u * (largest**-2 - smallest**-2)) ** -0.5).astype(np.float32)


def draw_leaves(side: int, rng: np.random.Generator) -> Leaves:
    """Places leaves until they would cover the image about twice, later ones on top."""
    smallest = SUPERSAMPLING * math.exp(rng.uniform(math.log(1.0), math.log(16.0)))
    largest = 1.0 * side
    mean_area = 2 * math.pi * smallest**2 * math.log(largest / smallest)
    count = min(MOST_LEAVES, math.ceil(2 * side**2 / mean_area))
    radius = power_law_radii(count, smallest, largest, rng)
    x, y = rng.uniform(-0.1 * side, 1.1 * side, (2, count)).astype(np.float32)
    image = Image.new("I", (side, side), 0)
    draw = ImageDraw.Draw(image)
    disks = rng.random(count) < 0.5
    outlines = polygons(radius, x, y, rng)
    for index in range(count):
        if disks[index]:
            r, u, v = float(radius[index]), float(x[index]), float(y[index])
            draw.ellipse((u - r, v - r, u + r, v + r), fill=index + 1)
        else:
            draw.polygon(outlines[index], fill=index + 1)
    middle, whole = np.array([side / 2], np.float32), np.array([side], np.float32)
    return Leaves(np.asarray(image), *(np.concatenate(pair) for pair in ((whole, radius), (middle, x), (middle, y))))


def polygons(radius: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> list[list[float]]:
    """Outlines of rotated ellipses, and of polygons with 3 to 6 corners: [x0, y0, x1, y1, ..] each."""
    count = len(radius)
    corners = np.where(rng.random(count) < 0.5, VERTICES, rng.integers(3, 7, count))
    aspect = np.exp(rng.uniform(math.log(0.04), 0, count)).astype(np.float32)  # from blades to disks
    rotation = rng.uniform(0, 2 * math.pi, count).astype(np.float32)
    step = np.minimum(np.arange(VERTICES)[None], corners[:, None] - 1)  # the last corner repeats
    angle = 2 * math.pi * step / corners[:, None]
    a, b = radius[:, None] * np.cos(angle), (radius * aspect)[:, None] * np.sin(angle)
    cosine, sine = np.cos(rotation)[:, None], np.sin(rotation)[:, None]
    points = np.stack([x[:, None] + a * cosine - b * sine, y[:, None] + a * sine + b * cosine], -1)
    return points.reshape(count, 2 * VERTICES).tolist()


def leaf_colours(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 3) float32 in [0, 1]: variations of a few base colours; brightness varies most, then warm to cool, then green."""

    def colours(number: int, light: np.ndarray, spread: float) -> np.ndarray:
        warm, green = rng.laplace(0, 0.12 * spread, number), rng.laplace(0, 0.06 * spread, number)
        return light[:, None] * GREY + warm[:, None] * WARM + green[:, None] * GREEN

    number = int(rng.integers(2, 8))
    base = colours(number, rng.beta(1.2, 1.5, number), 1.0)
    variation = colours(count, rng.normal(0, 0.1, count), 0.3)
    contrast = rng.uniform(0.4, 1.0)
    chosen = base[rng.integers(number, size=count)] + variation
    return np.clip(base.mean() + contrast * (chosen - base.mean()), 0, 1).astype(np.float32)


def add_stripes(light: np.ndarray, leaves: Leaves, rng: np.random.Generator) -> None:
    """Adds gratings, from sine to square waves, to one leaf in seven, in place."""
    count = len(leaves.radius)
    amplitude = np.where(rng.random(count) < 1 / 7, rng.uniform(0.03, 0.2, count), 0).astype(np.float32)
    wavelength = SUPERSAMPLING * np.exp(rng.uniform(math.log(3), math.log(24), count))
    direction = rng.uniform(0, math.pi, count)
    kx, ky = (2 * math.pi * part(direction) / wavelength for part in (np.cos, np.sin))
    hardness = rng.uniform(0.5, 8, count)
    rows, columns = np.nonzero(amplitude[leaves.seen])
    leaf = leaves.seen[rows, columns]
    wave = np.sin((kx[leaf] * columns + ky[leaf] * rows).astype(np.float32))
    light[rows, columns] += amplitude[leaf] * np.tanh(hardness[leaf].astype(np.float32) * wave)
