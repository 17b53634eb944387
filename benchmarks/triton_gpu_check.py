"""The Triton kernels on a GPU: are they right, and how fast are they against cuDNN and cuBLAS in bfloat16?

    python -m benchmarks.triton_gpu_check --output benchmarks/results/triton_NAME.json

Needs torch and triton alone, neither diffusers nor optimum-quanto. First every check of equality (`--checks-only` stops there;
with TRITON_INTERPRET=1 these run without a GPU, at tiny sizes), then times at the layer shapes of Stable Diffusion 2.1 for an
image of 512 x 512, weights random. Exit status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from qartsr_pipeline.arithmetic.affine import BITS, centred_codes
from qartsr_pipeline.arithmetic.packing import pack
from qartsr_pipeline.kernels import BACKENDS, LayerSpec, PreparedWeights
from qartsr_pipeline.kernels.triton import interpreted

TRITON, REFERENCE = BACKENDS["triton"], BACKENDS["reference"]
LEAST_DECIBELS = {torch.float32: 100.0, torch.bfloat16: 40.0, torch.float16: 40.0}
# (height and width, inputs, outputs, kernel, stride): where the arithmetic of SD 2.1 at 512 x 512 is
CONVOLUTIONS = [
    (512, 128, 128, 3, 1),
    (512, 256, 128, 3, 1),
    (512, 128, 128, 3, 2),
    (256, 256, 256, 3, 1),
    (128, 512, 512, 3, 1),
    (64, 512, 512, 3, 1),
    (64, 320, 320, 3, 1),
    (32, 640, 640, 3, 1),
    (16, 1280, 1280, 3, 1),
    (512, 256, 128, 1, 1),
    (64, 960, 320, 1, 1),
]
LINEARS = [(4096, 320, 320), (4096, 320, 2560), (4096, 1280, 320), (1024, 640, 5120), (256, 1280, 1280)]  # rows, inputs, outputs
SCHEMES = [(8, 8, 0), (4, 4, 0), (4, 4, 16), (4, 4, 32), (3, 3, 0), (2, 2, 0)]  # weight bits, activation bits, rank


class RandomLayer(nn.Module):
    """The buffers of a deployed layer (`docs/stored_format.md`, section 3) with random contents."""

    def __init__(self, spec: LayerSpec, seed: int = 0):
        super().__init__()
        self.spec, self.prepared = spec, PreparedWeights()
        generator = torch.Generator().manual_seed(seed)
        outputs, length = spec.out_channels, spec.in_channels * spec.kernel_size[0] * spec.kernel_size[1]
        bits, rank = spec.weight_bits, spec.rank
        kernel = spec.kernel_size if spec.kind == "conv2d" else ()
        if bits == 8:
            packed = torch.randint(-127, 128, (outputs, length), generator=generator).to(torch.int8).view(torch.uint8)
        else:
            packed = pack(torch.randint(2**bits, (outputs, length), generator=generator), bits)
        zero_point = torch.randint(2**bits, (outputs,), generator=generator).to(torch.uint8)
        input_zero_point = torch.randint(2**spec.activation_bits, (), generator=generator).to(torch.uint8)
        down = torch.randn(rank, spec.in_channels, generator=generator) / spec.in_channels**0.5
        up = torch.randn(outputs, rank, *kernel, generator=generator) / length**0.5
        for name, value in {
            "weight_packed": packed,
            "weight_scale": (0.5 + torch.rand(outputs, generator=generator)) / (2**bits * length**0.5),
            "weight_zero_point": zero_point if bits < 8 else None,
            "input_scale": torch.tensor(4.0 / 2**spec.activation_bits),
            "input_zero_point": input_zero_point,
            "smooth": 0.5 + torch.rand(spec.in_channels, generator=generator),
            "branch_down": down.half() if rank else None,
            "branch_up": up.half() if rank else None,
            "bias": torch.randn(outputs, generator=generator),
        }.items():
            self.register_buffer(name, value)


def conv_spec(bits: tuple[int, int], rank: int, inputs: int, outputs: int, kernel: int, stride: int, padding: int) -> LayerSpec:
    """A square convolution's spec."""
    pairs = ((kernel, kernel), (stride, stride), (padding, padding))
    return LayerSpec("conv2d", *bits, rank, inputs, outputs, *pairs)


def decibels(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to noise ratio; infinite where both are equal."""
    noise = (y.double() - expected.double()).square().sum().item()
    signal = expected.double().square().sum().clamp(min=1e-300).item()
    return float("inf") if noise == 0 else 10 * torch.log10(torch.tensor(signal / noise)).item()


def quantized(x: torch.Tensor, layer: nn.Module, norm=None):
    """The Triton kernel's codes and hidden values of x (B, H, W, C), after a `ChannelNorm` if one is given."""
    from qartsr_pipeline.kernels.triton.quantize import quantize

    return quantize(x, layer, norm)


def quantizer_is_exact(x: torch.Tensor, layer: nn.Module) -> bool:
    """Whether the integers that enter the product are those of `arithmetic.affine`; x is (rows, C)."""
    bits, zero_point = layer.spec.activation_bits, layer.input_zero_point.float()
    expected = centred_codes(x.clone(), layer.smooth / layer.input_scale, zero_point, bits).nan_to_num(nan=0.0)
    codes = quantized(x[None, None], layer).codes[0, 0].float()
    return torch.equal(codes + (128 - zero_point) if bits == 8 else codes, expected)


def hard_values(layer: nn.Module, dtype: torch.dtype, rows: int = 40) -> torch.Tensor:
    """(rows, C) with ties between codes, values far out, NaN and infinities."""
    x = torch.randn(rows, layer.spec.in_channels, generator=torch.Generator().manual_seed(1)).to(layer.smooth.device)
    halves = torch.arange(rows, device=x.device)[:, None] - rows // 2 + 0.5
    x[:, ::2] = halves * layer.input_scale / layer.smooth[::2]
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = float("nan"), float("inf"), -float("inf"), 1e30
    return x.to(dtype)


def checks(device: str, bit_pairs: list[tuple[int, int]], channels: tuple[int, ...]) -> list[dict[str, object]]:
    """Every check of equality, as rows with a name, a value and whether that is good."""
    rows = []

    def compare(name: str, layer: nn.Module, x: torch.Tensor) -> None:
        function = layer.spec.kind
        y = getattr(TRITON, function)(x, layer)
        value = decibels(y, getattr(REFERENCE, function)(x, layer))
        rows.append({"check": name, "decibels": value, "good": value >= LEAST_DECIBELS[x.dtype]})

    for bits, inputs, dtype in itertools.product(bit_pairs, channels, LEAST_DECIBELS):
        label = f"W{bits[0]}A{bits[1]}, {inputs} channels, {str(dtype)[6:]}"
        for rank in (0, 5):
            layer = RandomLayer(LayerSpec("linear", *bits, rank, inputs, 19)).to(device)
            x = torch.randn(2, 9, inputs, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            compare(f"linear {label}, rank {rank}", layer, x)
            for kernel, stride, padding in ((3, 1, 1), (3, 2, 1), (1, 1, 0)):
                layer = RandomLayer(conv_spec(bits, rank, inputs, 19, kernel, stride, padding)).to(device)
                x = torch.randn(2, inputs, 5, 6, generator=torch.Generator().manual_seed(0)).to(device, dtype)
                compare(f"conv {kernel}x{kernel}/{stride} {label}, rank {rank}", layer, x)
        good = quantizer_is_exact(hard_values(layer, dtype), layer)
        rows.append({"check": f"integers {label}", "decibels": None, "good": good})
    return rows


def milliseconds(functions: dict[str, object], rounds: int = 5) -> dict[str, list[float]]:
    """Times of each function on the GPU, one median of many calls per round; the functions take turns."""
    from triton.testing import do_bench

    found = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            found[name].append(do_bench(function, return_mode="median"))
    return found


def timed(name: str, spec: LayerSpec, x: torch.Tensor) -> dict[str, object]:
    """One row of the table: the layer, its two parts, and the float layer in bfloat16 on the same input."""
    layer = RandomLayer(spec).to(x.device)
    bias = layer.bias.to(x.dtype)
    if spec.kind == "conv2d":
        weight = torch.randn(spec.out_channels, spec.in_channels, *spec.kernel_size, device=x.device, dtype=x.dtype)
        weight = weight.to(memory_format=torch.channels_last)
        pixels, compute = x.permute(0, 2, 3, 1), TRITON.conv2d

        def usual() -> torch.Tensor:
            return F.conv2d(x, weight, bias, spec.stride, spec.padding)
    else:
        weight = torch.randn(spec.out_channels, spec.in_channels, device=x.device, dtype=x.dtype)
        pixels, compute = x[None, None], TRITON.linear

        def usual() -> torch.Tensor:
            return F.linear(x, weight, bias)

    functions = {
        "triton": lambda: compute(x, layer),
        "quantize": lambda: quantized(pixels, layer),
        "bfloat16": usual,
    }
    measured = milliseconds(functions)
    medians = {key: statistics.median(values) for key, values in measured.items()}
    row = {"layer": name, "weight_bits": spec.weight_bits, "activation_bits": spec.activation_bits, "rank": spec.rank}
    ratio = medians["bfloat16"] / medians["triton"]
    kept = sum(b.numel() * b.element_size() for b in layer.buffers()) + layer.prepared.bytes
    return row | {"milliseconds": measured, "faster": ratio, "bytes": kept, "bytes_bfloat16": 2 * weight.numel()}


def timings(device: str) -> list[dict[str, object]]:
    """The table of times."""
    rows = []
    for weight_bits, activation_bits, rank in SCHEMES:
        bits = (weight_bits, activation_bits)
        for size, inputs, outputs, kernel, stride in CONVOLUTIONS:
            spec = conv_spec(bits, rank, inputs, outputs, kernel, stride, kernel // 2)
            x = torch.randn(1, inputs, size, size, device=device, dtype=torch.bfloat16)
            x = x.to(memory_format=torch.channels_last)
            rows.append(timed(f"conv {kernel}x{kernel}/{stride} {inputs}->{outputs} at {size}", spec, x))
        for count, inputs, outputs in LINEARS:
            spec = LayerSpec("linear", *bits, rank, inputs, outputs)
            x = torch.randn(count, inputs, device=device, dtype=torch.bfloat16)
            rows.append(timed(f"linear {inputs}->{outputs}, {count} rows", spec, x))
    return rows


def hardware() -> dict[str, object]:
    """What the numbers were measured with."""
    import triton

    found = {"torch": torch.__version__, "triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    return found


def write(path: Path, report: dict[str, object]) -> None:
    """JSON, under a temporary name first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="the JSON report")
    parser.add_argument("--checks-only", action="store_true", help="measure no times")
    args = parser.parse_args()
    if reason := TRITON.unavailable():
        raise SystemExit(f"the Triton kernels cannot run here: {reason}")
    on_gpu = not interpreted()
    device = "cuda" if on_gpu else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # the reference computes in float32
    pairs = list(itertools.product(BITS, BITS)) if on_gpu else [(4, 4), (3, 8)]
    with torch.no_grad():
        report = {"hardware": hardware(), "checks": checks(device, pairs, (64, 320, 20, 13) if on_gpu else (32, 5))}
        bad = [row["check"] for row in report["checks"] if not row["good"]]
        print(f"{len(report['checks'])} checks, {len(bad)} failed", *bad, sep="\n")
        torch.backends.cudnn.benchmark = True  # the peer at its best
        if on_gpu and not args.checks_only:
            report["times"] = timings(device)
            for row in report["times"]:
                print("W{weight_bits}A{activation_bits} rank {rank:2} {layer}: {faster:.2f} x bfloat16".format(**row))
    if args.output:
        write(args.output, report)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
