"""A second reader of the stored format, written from docs/stored_format.md alone: numpy, no torch, nothing of the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

DTYPES = {"U8": np.dtype("u1"), "I8": np.dtype("i1"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    header_size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_size])
    body = data[8 + header_size :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(body[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def expected_tensors(layer: dict, bias: bool) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Section 3: name -> dtype, shape."""
    b, a, r, n, c = (layer[key] for key in ("weight_bits", "activation_bits", "rank", "outputs", "inputs"))
    kernel = tuple(layer.get("kernel", ()))
    taps = int(np.prod(kernel, dtype=int))
    u8, f16, f32 = DTYPES["U8"], DTYPES["F16"], DTYPES["F32"]
    static = a < 16 and layer.get("grid", "tensor") == "tensor"
    r = min(r, n * taps, c)
    table = {
        "weight_packed": (u8, (n, -(-taps * c * b // 8)), b < 16),
        "weight_scale": (f32, (n,), b < 16),
        "weight_zero_point": (u8, (n,), b < 8),
        "weight": (f16, (n, c, *kernel), b == 16),
        "input_scale": (f32, (), static),
        "input_zero_point": (u8, (), static),
        "input_exponents": (DTYPES["I8"], (c,), layer.get("exponents", False)),
        "smooth": (f32, (c,), True),
        "branch_down": (f16, (r, c), r > 0),
        "branch_up": (f16, (n, r, *kernel), r > 0),
        "bias": (f32, (n,), bias),
    }
    return {name: (dtype, shape) for name, (dtype, shape, present) in table.items() if present}


def centred_weight_codes(layer: dict, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """Section 4: integers, (N, C) or (N, C, kh, kw)."""
    bits, inputs = layer["weight_bits"], layer["inputs"]
    kh, kw = layer.get("kernel", (1, 1))
    codes = np.zeros((layer["outputs"], inputs, kh, kw), dtype=np.int64)
    for n, row in enumerate(tensors["weight_packed"]):
        for i, j, c in np.ndindex(kh, kw, inputs):
            k = (i * kw + j) * inputs + c
            if bits == 8:
                code = int(row[k]) - 256 * (row[k] > 127)
            else:
                stream = [int(row[t // 8]) >> (t % 8) & 1 for t in range(k * bits, k * bits + bits)]
                code = sum(bit << place for place, bit in enumerate(stream)) - int(tensors["weight_zero_point"][n])
            codes[n, c, i, j] = code
    return codes if "kernel" in layer else codes[:, :, 0, 0]


def input_operand(layer: dict, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """u of section 5."""
    smooth = tensors["smooth"].reshape(-1, 1, 1) if layer["kind"] == "conv2d" else tensors["smooth"]
    bits = layer["activation_bits"]
    if bits == 16:
        return x * smooth
    zero_point = np.float32(tensors["input_zero_point"])
    return np.clip(np.rint(x * (smooth / tensors["input_scale"])) + zero_point, 0, 2**bits - 1) - zero_point


def token_operand(layer: dict, tensors: dict[str, np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u of section 5 on the token grid, and the scale of each token."""
    v, channels, h = x * tensors["smooth"], layer["inputs"], 1
    while 2 * h <= layer["rotation"] and channels % (2 * h) == 0:
        h *= 2
    if h > 1:
        s = 1
        while s < h:
            pairs = v.reshape(*v.shape[:-1], -1, 2, s)
            first, second = pairs[..., 0, :], pairs[..., 1, :]
            v, s = np.stack([first + second, first - second], -2).reshape(v.shape), 2 * s
        v = v * np.float32(h**-0.5)
    powers = np.exp2(tensors["input_exponents"].astype(np.float32)) if layer["exponents"] else np.ones(channels, np.float32)
    v = v / powers
    largest = np.maximum(np.abs(v).max(-1, keepdims=True), np.float32(1e-30))
    most = np.float32(2 ** (layer["activation_bits"] - 1) - 1)
    return np.rint(v * (most / largest)) * powers, largest / most


def cross_correlation(u: np.ndarray, w: np.ndarray, stride: list[int], padding: list[int]) -> np.ndarray:
    (batch, _, height, width), (outputs, _, kh, kw) = u.shape, w.shape
    padded = np.zeros((batch, u.shape[1], height + 2 * padding[0], width + 2 * padding[1]))
    padded[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width] = u
    rows, columns = (padded.shape[2] - kh) // stride[0] + 1, (padded.shape[3] - kw) // stride[1] + 1
    y = np.zeros((batch, outputs, rows, columns))
    for n, row, column in np.ndindex(outputs, rows, columns):
        top, left = row * stride[0], column * stride[1]
        y[:, n, row, column] = (padded[:, :, top : top + kh, left : left + kw] * w[n]).sum((1, 2, 3))
    return y


def compute(layer: dict, tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Section 5, for a float32 model."""
    convolution = layer["kind"] == "conv2d"

    def product(operand: np.ndarray, weight: np.ndarray) -> np.ndarray:
        weight = weight.astype(np.float64)
        return cross_correlation(operand, weight, layer["stride"], layer["padding"]) if convolution else operand @ weight.T

    def over_outputs(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 1, 1) if convolution else values

    weight = tensors["weight"] if layer["weight_bits"] == 16 else centred_weight_codes(layer, tensors)
    token = layer.get("grid", "tensor") == "token"
    operand, own = (
        token_operand(layer, tensors, x) if token else (input_operand(layer, tensors, x), tensors.get("input_scale", 1.0))
    )
    scale = own * over_outputs(tensors.get("weight_scale", np.ones(layer["outputs"])))
    y = scale * product(operand.astype(np.float64), weight)
    if layer["rank"]:
        smooth = tensors["smooth"].reshape(-1, 1, 1) if convolution else tensors["smooth"]
        down = tensors["branch_down"].astype(np.float64)
        hidden = np.einsum("jc,bchw->bjhw", down, x * smooth) if convolution else (x * smooth) @ down.T
        y = y + product(hidden, tensors["branch_up"])
    return y + over_outputs(tensors["bias"]) if "bias" in tensors else y
