"""The Triton kernels compile to machine code for real GPUs, which needs no GPU: what the interpreter cannot show.

Compiling happens in a process of its own (this file, run as a program): in the tests' own process kernels are interpreted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CAPABILITIES = (80, 90, 120)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_kernels_compile_and_use_the_tensor_cores(capability: int):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE)])
    command = [sys.executable, str(Path(__file__).resolve()), str(capability)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    compiled = set(result.stdout.split())
    assert compiled == {"_block_kernel", "_conv_kernel", "_group_kernel", "_linear_kernel", "_quantize_kernel"}


def compile_everything(capability: int, all_configurations: bool, report) -> None:
    """Calls the backend on CPU tensors, and compiles each kernel it launches instead of running it.

    Args:
        report: called with the kernel's function, its constants, and what `triton.compile` returned.
    """
    import torch
    import triton
    from deployed_layers import random_layer
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction, mangle_type

    from qartsr_pipeline.kernels.triton.backend import Triton
    from qartsr_pipeline.quantization.scheme import LayerScheme

    def compile_instead(kernel, *args, grid, warmup=False, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "num_ctas", "maxnreg") if name in kwargs}
        kwargs = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, divisible = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = values[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                signature[parameter.name], constants[(place,)] = "constexpr", value
                continue
            signature[parameter.name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                divisible[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, divisible)
        options = {name: value for name, value in options.items() if value is not None}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        report(kernel.fn.__name__, values, compiled)

    def run_configurations(tuned, *args, **kwargs):
        tuned.nargs = dict(zip(tuned.arg_names, args, strict=False))
        for config in tuned.prune_configs(kwargs)[: None if all_configurations else 1]:
            tuned.fn.run(*args, **kwargs, **config.all_kwargs())

    triton_backend = Triton()
    JITFunction.run, Autotuner.run = compile_instead, run_configurations
    for bits, rank, channels in (((4, 4), 16, 128), ((3, 3), 0, 320), ((2, 2), 32, 128), ((8, 8), 4, 128), ((6, 8), 0, 20)):
        layer = random_layer(torch.nn.Conv2d(channels, 128, 3, 1, 1), LayerScheme(*bits, rank))
        norm = torch.nn.GroupNorm(4, channels)
        x = torch.zeros(1, channels, 16, 16, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        triton_backend.conv2d(x, layer)
        residual = torch.zeros(1, 128, 16, 16, dtype=x.dtype)
        triton_backend.norm_conv2d(x, *triton_backend.group_scale_shift(x, norm), layer, silu=True, residual=residual)
        triton_backend.linear(x.flatten(2).mT, random_layer(torch.nn.Linear(channels, 128), LayerScheme(*bits, rank)))


def main() -> None:
    capability = int(sys.argv[1])
    products = {"_linear_kernel", "_conv_kernel"}

    def check(name, values, compiled):
        if name in products:
            assert "s32.s8.s8" in compiled.asm["ptx"], f"{name} does not use the tensor cores"
        print(name)

    compile_everything(capability, False, check)


if __name__ == "__main__":
    main()
