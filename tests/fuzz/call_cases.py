"""Calls with odd arguments: each is refused clearly or gives an image, and the pipeline is afterwards as it was before."""

from __future__ import annotations

import decimal
import fractions
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folder_cases import X, enlarge, templates
from judging import CallersError, Failure, judge_error, judge_image
from PIL import Image

from qartsr_pipeline import QArtSRPipeline

_pipelines: dict[str, QArtSRPipeline] = {}
NUMBERS: list[Any] = [
    0, 1, 2, 3, 4, -1, 16, 17, 1.5, 2.5, 0.3, 1e-9, -0.0, math.nan, math.inf, -math.inf, 10**400, 2**63, "4", "", None,
    True, 3 + 0j,
    np.int64(3), np.uint8(2), np.float32(2.0), np.float64(1.3), np.array(2), np.array([2.0]), torch.tensor(2),
    torch.tensor(2.5),
    fractions.Fraction(3, 2), decimal.Decimal("1.5"), [2], {}, b"4", object(), float,
]  # fmt: skip


MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I I;16 F".split()


def image_of(rng: random.Random) -> Any:
    """An image, or something that is none."""
    height, width, channels = rng.choice([1, 2, 5, 9]), rng.choice([1, 3, 8, 11]), rng.choice([1, 2, 3, 4])
    array = np.random.RandomState(rng.randrange(99)).rand(height, width, channels).astype("float32")
    eight = (array * 255).astype("uint8")
    choices: list[Any] = [
        None, 7, "photo.png", b"", [], (), [[]], {}, object(), Image, np.zeros(0), np.zeros((0, 4, 3)), np.zeros((4, 0, 3),
        "uint8"),
        array, eight, array * 2, array - 1, array * math.nan, np.full_like(array, np.inf), array.astype("float16"),
        array.astype(">f4"),
        array.astype("float64"), eight.astype("int64"), eight.astype("uint16") * 257, eight.astype("uint32"),
        eight.astype(bool),
        array.astype("complex64"), eight.astype(object), eight.astype("U3"), array[..., None], array[::-1, ::-1], eight[:,
        :, 0],
        np.zeros((2, 2, 5)), np.zeros((3, 3, 3, 3, 3)), np.broadcast_to(eight[:1], eight.shape), np.ma.masked_array(eight,
        eight > 9),
        torch.from_numpy(array).permute(2, 0, 1), torch.from_numpy(eight).permute(2, 0, 1), torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1).to(torch.bfloat16), torch.from_numpy(array).permute(2, 0, 1).to_sparse(),
        torch.empty(3, 4, 4, device="meta"), torch.zeros(3, 0, 4), torch.tensor(1.0), torch.zeros(3, 4, 4,
        dtype=torch.complex64),
        torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, requires_grad=True), torch.full((3, 4, 4), math.nan),
        torch.quantize_per_tensor(torch.zeros(3, 4, 4), 0.1, 0, torch.quint8), torch.zeros(3, 4, 4, dtype=torch.int8),
        [eight, array], [Image.new("RGB", (3, 4)), eight], [eight, None], [[eight]], (eight,), {eight.tobytes(): 1},
        iter([eight]),
    ]  # fmt: skip
    if rng.random() < 0.25:
        return Image.new(rng.choice(MODES), rng.choice([(1, 1), (7, 3), (0, 4), (5, 5)]))
    return rng.choice(choices)


def callback_of(rng: random.Random) -> Any:
    """A callback that returns something else than a table of tensors, or fails."""

    def fail(*_: Any) -> None:
        raise CallersError("from the callback")

    shape = rng.choice([(1, 3, 4, 4), (3,), (), (2, 3, 36, 28)])
    returned = rng.choice(
        [
            None, {}, 7, "image", [], {"image": None}, {"image": 7}, {"image": torch.zeros(shape)},
            {"latents": torch.zeros(shape)},
            {"zzz": torch.zeros(3)}, {"image": torch.full((1, 3, 36, 28), math.nan)}, {"image": np.zeros((1, 3, 36, 28))},
            {"image": torch.zeros(1, 3, 36, 28, dtype=torch.float16)}, {"image": torch.zeros(1, 3, 36, 28, device="meta")},
        ]
    )  # fmt: skip
    return rng.choice([fail, 7, "callback", lambda *_: returned, lambda *_: returned, lambda *_: returned])


def arguments_of(rng: random.Random) -> dict[str, Any]:
    """Up to three arguments of a call that are not the usual ones."""
    odd = {
        "upscale": lambda: rng.choice(NUMBERS),
        "tile_size": lambda: rng.choice([*NUMBERS, 32, 48, 64, 512, np.int32(64)]),
        "tile_overlap": lambda: rng.choice([*NUMBERS, 8, 16, 64, np.int32(8)]),
        "color_fix": lambda: rng.choice([None, "wavelet", "adain", "Wavelet", "", 0, False, [], np.str_("adain"), object()]),
        "generator": lambda: rng.choice([None, 0, torch.Generator(), [torch.Generator()], np.random.default_rng(0), "cpu", True]),
        "sample_posterior": lambda: rng.choice([True, False, 0, 1, None, "yes", np.bool_(True), torch.tensor(True)]),
        "output_type": lambda: rng.choice(["pil", "np", "pt", "latent", "PIL", "numpy", None, 0, [], b"np", np.str_("np")]),
        "return_dict": lambda: rng.choice([True, False, None, 0, "no"]),
        "callback_on_step_end": lambda: callback_of(rng),
        "callback_on_step_end_tensor_inputs": lambda: rng.choice(
            [[], ["image"], ["latents"], ["zzz"], None, 7, "image", [7], [None]]
        ),
        "prompt": lambda: rng.choice(["", "ab c", None, 7, ["a"], b"a", "\ud800", "a" * 100_000, "\0", {}]),
    }
    return {name: odd[name]() for name in rng.sample(sorted(odd), rng.choice([1, 1, 2, 3]))}


def run_case(rng: random.Random, place: Path) -> str:
    """One call; returns its description, raises Failure with it."""
    kind = rng.choice(["fp", "quantized", "text"])
    template = templates(place)[kind]
    if kind not in _pipelines:
        _pipelines[kind] = QArtSRPipeline.from_pretrained(template.folder)
        _pipelines[kind].set_progress_bar_config(disable=True)
    pipeline = _pipelines[kind]
    arguments = arguments_of(rng)
    image = image_of(rng) if rng.random() < 0.5 else X
    said = f"{kind}: image {_shown(image)}, {', '.join(f'{name}={_shown(value)}' for name, value in arguments.items())}"
    try:
        _judge_result(pipeline(image, **arguments), arguments)
    except CallersError:
        pass
    except Failure as failure:
        raise Failure(f"{said}: {failure}") from failure
    except Exception as error:
        try:
            judge_error(error)
        except Failure as failure:
            raise Failure(f"{said}: {failure}") from error
    try:
        judge_image(enlarge(pipeline), template.image)
    except Exception as error:
        del _pipelines[kind]
        raise Failure(f"{said}: afterwards the pipeline is another one: {error}") from error
    return said


def _judge_result(result: Any, arguments: dict[str, Any]) -> None:
    images = result[0] if isinstance(result, tuple) else result.images
    if arguments.get("output_type", "pil") == "latent":
        return
    for image in images:
        pixels = np.asarray(image)
        if pixels.size == 0 or not np.isfinite(pixels).all():
            raise Failure(f"a result of shape {pixels.shape} with NaN or without pixels, without a word")


def _shown(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, np.ndarray):
        return f"array {value.dtype} {value.shape}"
    if isinstance(value, torch.Tensor):
        return f"tensor {value.dtype} {tuple(value.shape)} {value.device} {value.layout}"
    if isinstance(value, Image.Image):
        return f"PIL {value.mode} {value.size}"
    return f"{kind} {ascii(value)[:60]}" if isinstance(value, (int, float, str, bytes, bool, type(None))) else kind
