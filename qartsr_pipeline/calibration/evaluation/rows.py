"""What an evaluation returns: rows of numbers, as objects, as JSON and as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

SECONDS = "seconds"
TEMPORAL, E_WARP, SECONDS_A_FRAME = "temporal_error", "e_warp", "seconds_a_frame"  # of clips
COLUMNS = {
    "psnr_y": ("PSNR-Y", "{:.2f}"),
    "ssim_y": ("SSIM-Y", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "lpips_vgg": ("LPIPS (VGG)", "{:.4f}"),
    "dists": ("DISTS", "{:.4f}"),
    TEMPORAL: ("temporal error", "{:.3f}"),
    E_WARP: ("E_warp", "{:.3f}"),
    "e_warp_over_full_precision": ("E_warp over full precision's", "{:.3f}"),
    "gain": ("over bicubic", "{:+.2f}"),
    "share_of_gain": ("of full precision's gain", "{:.1%}"),
    "psnr_y_to_full_precision": ("PSNR-Y to full precision", "{:.2f}"),
    "ssim_y_to_full_precision": ("SSIM-Y to full precision", "{:.4f}"),
    "closer_than_bicubic": ("closer to it than bicubic", "{:+.2f}"),
    SECONDS: ("s an image", "{:.2f}"),
    SECONDS_A_FRAME: ("s a frame", "{:.2f}"),
}
TO_FULL_PRECISION = "_to_full_precision"


@dataclass(frozen=True)
class EvaluationRow:
    """One method's values over all images.

    Attributes:
        name: of the model; "bicubic" for plain enlargement.
        kind: "bicubic", "peer" (another upscaler), "model", "bypass" (the UNet left out: z_H = z_L) or "autoencoder" (encoder and
            decoder on the original).
        color_fix: the colour alignment, None without.
        full_precision: whether the model is not quantized; None for bicubic and peers.
        images: how many were measured.
        values: metric -> mean over the images. "METRIC_to_full_precision" compares with the first model's output instead of the
            original, and "bicubic_to_full_precision" is the PSNR-Y of bicubic to that output; there are none for the first model
            itself, nor without one in full precision. An infinite PSNR (equal images) counts only where all are infinite.
        per_image: the same, image by image, and "seconds".
        seconds: mean time of the network for an image; None where it did not run.
        gain: PSNR-Y over that of bicubic, in dB; None for bicubic and where PSNR-Y is not measured.
        share_of_gain: of the gain of the first model in full precision under the same colour alignment.
        closer_than_bicubic: by how many dB the output is closer to the full-precision output than bicubic is.
        e_warp_over_full_precision: E_warp over that of the first model, if that is in full precision.
    """

    name: str
    kind: str
    color_fix: str | None
    full_precision: bool | None
    images: int
    values: Mapping[str, float]
    per_image: Mapping[str, Sequence[float]] = field(repr=False)
    seconds: float | None = None
    gain: float | None = None
    share_of_gain: float | None = None
    closer_than_bicubic: float | None = None
    e_warp_over_full_precision: float | None = None

    def numbers(self) -> dict[str, float]:
        """All means by name: `values`, then seconds and what compares rows, where there are any."""
        compared = ("gain", "share_of_gain", "closer_than_bicubic", "e_warp_over_full_precision")
        further = {name: getattr(self, name) for name in (SECONDS, *compared)}
        return {**self.values, **{name: value for name, value in further.items() if value is not None}}

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`: infinite and undefined numbers become None, which JSON has instead."""
        row = {"name": self.name, "kind": self.kind, "color_fix": self.color_fix, "full_precision": self.full_precision}
        per_image = {metric: [_finite(value) for value in values] for metric, values in self.per_image.items()}
        return row | {name: _finite(value) for name, value in self.numbers().items()} | {"per_picture": per_image}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class RowKey(NamedTuple):
    """What tells one row from another."""

    name: str
    kind: str
    color_fix: str | None = None
    full_precision: bool | None = None


def make_rows(measured: Mapping[RowKey, Mapping[str, list[float]]], images: int | None = None) -> list[EvaluationRow]:
    """Rows from the values of every image.

    Args:
        measured: row -> metric -> one value an image, in the order of the rows; "bicubic" is among them.
        images: so many were measured; None for the number of values.
    """
    means = {key: {metric: mean(values) for metric, values in metrics.items()} for key, metrics in measured.items()}
    bicubic = next(means[key] for key in measured if key.kind == "bicubic").get("psnr_y")
    models = [key for key in measured if key.kind == "model"]
    reference = models[0].name if models and models[0].full_precision else None
    gains = {key: of["psnr_y"] - bicubic for key, of in means.items() if bicubic is not None and key.kind != "bicubic"}
    warped = next((means[key].get(E_WARP) for key in models if key.name == reference), None)  # None without clips
    whole = {key.color_fix: gains[key] for key in models if key.name == reference and key in gains}
    others = [key for key in models if key.name != reference]
    rows = []
    for key, metrics in measured.items():
        compared = key in others and whole.get(key.color_fix, 0) > 0
        rows.append(
            EvaluationRow(
                *key,
                images=max(map(len, metrics.values()), default=0) if images is None else images,
                values={metric: value for metric, value in means[key].items() if metric != SECONDS},
                per_image={metric: tuple(values) for metric, values in metrics.items()},
                seconds=means[key].get(SECONDS),
                gain=gains.get(key),
                share_of_gain=gains[key] / whole[key.color_fix] if compared else None,
                closer_than_bicubic=_closer_than_bicubic(metrics),
                e_warp_over_full_precision=means[key][E_WARP] / warped if warped and key in others else None,
            )
        )
    return rows


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; infinite values (equal images) count only when all are."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def _closer_than_bicubic(values: Mapping[str, list[float]]) -> float | None:
    if "bicubic_to_full_precision" not in values:
        return None
    pairs = zip(values["psnr_y_to_full_precision"], values["bicubic_to_full_precision"], strict=True)
    return mean([output - bicubic for output, bicubic in pairs])


def table(rows: Sequence[EvaluationRow]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table, a line a row: the columns of `COLUMNS`, then metrics of other packages; only filled ones."""
    numbers = [{name: value for name, value in row.numbers().items() if math.isfinite(value)} for row in rows]
    names = dict.fromkeys(name for of in numbers for name in of if name != "bicubic_to_full_precision")
    further = sorted((name for name in names if name not in COLUMNS), key=lambda name: name.endswith(TO_FULL_PRECISION))
    columns = {name: column for name, column in COLUMNS.items() if name in names}
    columns |= {name: (_title(name), "{:.4f}") for name in further}
    lines = []
    for row, of in zip(rows, numbers, strict=True):
        colours = "" if row.kind in ("bicubic", "peer", "autoencoder") else row.color_fix or "as they come"
        lines.append([row.name, colours, *(layout.format(of[key]) if key in of else "" for key, (_, layout) in columns.items())])
    return ["model", "colours", *(title for title, _ in columns.values())], lines


def _title(metric: str) -> str:
    name = metric.removesuffix(TO_FULL_PRECISION)
    title = COLUMNS[name][0] if name in COLUMNS else name.upper()
    return title if name == metric else f"{title} to full precision"


def markdown(rows: Sequence[EvaluationRow]) -> str:
    """`table` in Markdown, its columns aligned."""
    header, cells = table(rows)
    lines = [header, [":--", ":--", *["--:"] * (len(header) - 2)], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
