"""One convolution layer of a baseline, computed by its released program and by ours, from the same numbers.

    python -m benchmarks run released-quantizers --lsq lsq-net --efficientdm EfficientDM --passionsr PassionSR \\
        --deepcompressor deepcompressor --output FILE.json

Every argument is a checkout: github.com/zhutmost/lsq-net (the reimplementation that is used most, LSQ's authors released none),
ThisisBillhe/EfficientDM, libozhu03/PassionSR, mit-han-lab/deepcompressor (SVDQuant). Only their quantizers are imported. Each
number is the largest difference of what it is named after, relative to the largest value there.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from benchmarks.result import Result, markdown
from qartsr_pipeline.arithmetic.group_grid import quantize_groups
from qartsr_pipeline.calibration.recipe_layers import Layer
from qartsr_pipeline.calibration.start.other_grids import layer_kinds
from qartsr_pipeline.quantization.calibrating import CalibratingMixin
from qartsr_pipeline.quantization.scheme import LayerScheme

BITS = (4, 2)
CHANNELS, OUTPUTS = 96, 32


def load(folder: Path, name: str, package: str = "") -> ModuleType:
    """A module of a checkout, from its file: the packages around it, which import much more, stay empty."""
    path = folder / (name.replace(".", "/") + ".py")
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = types.ModuleType(package + ".".join(parts[:depth]))
        parent.__path__ = [str(folder.joinpath(*parts[:depth]))]
        sys.modules.setdefault(parent.__name__, parent)
    spec = importlib.util.spec_from_file_location(package + name, path)
    if spec is None or not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: is {folder} a checkout of that project?")
    module = importlib.util.module_from_spec(spec)
    sys.modules[package + name] = module
    spec.loader.exec_module(module)
    return module


def example() -> tuple[nn.Conv2d, torch.Tensor]:
    """A 1 x 1 convolution, since PassionSR pads after its offset and we before, and inputs (2, C, 24, 24) that are off centre."""
    torch.manual_seed(0)
    x = torch.randn(2, CHANNELS, 24, 24) * torch.linspace(0.3, 3, CHANNELS).view(-1, 1, 1) + 0.5
    return nn.Conv2d(CHANNELS, OUTPUTS, 1), x


def ours(layer: nn.Conv2d, settings: Layer, bits: int, step: bool = False) -> CalibratingMixin:
    return layer_kinds(settings, step)[1].from_layer(layer, LayerScheme(bits, bits, settings.branch_rank))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


def compare_lsq(folder: Path, bits: int) -> dict[str, float]:
    """A weight's quantizer with a step for each output channel: values, and the gradient of the step."""
    quantizer = load(folder, "quan.quantizer.lsq", "lsq_net.").LsqQuan(bits, per_channel=True)
    layer, _ = example()
    weight = layer.weight.detach()
    quantizer.init_from(weight)
    mine = ours(layer, Layer(clip="before_rounding"), bits, step=True)
    step = quantizer.s.detach().flatten()
    with torch.no_grad():
        mine.weight_lower.copy_(quantizer.thd_neg * step)
        mine.weight_upper.copy_(quantizer.thd_pos * step)
    values, wanted = mine.qweight, quantizer(weight)
    torch.manual_seed(1)
    toward = torch.randn_like(weight)
    (values * toward).sum().backward()
    (wanted * toward).sum().backward()
    scaling = (quantizer.thd_pos * weight.numel()) ** 0.5  # its constant factor, which Adam takes out
    gradient = mine.weight_log_step.grad / step  # d/ds of a step trained in the logarithm
    return {
        "quantized weight": difference(values, wanted),
        "gradient of the step": difference(gradient, quantizer.s.grad.flatten() * scaling),
    }


def compare_efficientdm(folder: Path, bits: int) -> dict[str, float]:
    """Weight and input at the released program's own start."""
    module = load(folder, "quant_scripts.quant_layer", "efficientdm.")
    layer, x = example()
    of_weight = module.UniformAffineQuantizer(bits, channel_wise=True, scale_method="mse")
    of_input = module.UniformAffineQuantizer(bits, scale_method="mse")
    weight, codes = of_weight(layer.weight.detach()), of_input(x)
    mine = ours(layer, Layer(), bits)
    levels = 2**bits - 1
    with torch.no_grad():
        for name, quantizer in (("weight", of_weight), ("input", of_input)):
            scale, zero = quantizer.delta.detach().squeeze(), quantizer.zero_point.detach().squeeze()
            getattr(mine, f"{name}_lower").copy_(-zero * scale)
            getattr(mine, f"{name}_upper").copy_((levels - zero) * scale)
        output = nn.functional.conv2d(codes, weight, layer.bias)
        return {
            "quantized weight": difference(mine.qweight, weight),
            "quantized input": difference(mine.quantized_input(x, mine.smooth.view(-1, 1, 1)), codes),
            "output": difference(mine(x), output),
        }


def compare_passionsr(folder: Path, bits: int) -> dict[str, float]:
    """The whole layer with its scale and offset of each channel, at the released program's own start of scale and bounds."""
    for name in ("quant_config", "quant_layer"):
        load(folder, f"quantization.saw.{name}", "passionsr.")
    module = load(folder, "quantization.saw.saw_layer", "passionsr.")
    config = sys.modules["passionsr.quantization.saw.quant_config"]
    settings = {"quant_bits": bits, "sign": True, "sym": False, "layer_type": "2Dquant", "split": False}
    settings |= {"quantype": "", "method": "", "only_weight": False, "s_alpha": 0.3}
    layer, x = example()
    layer.bias = None  # the released program quantizes the bias, we do not
    theirs = module.saw_Conv2d_QuantLayer(layer, config.QuantizeModel_config(settings), "cpu", 0.3)
    theirs.recon_flag = True
    with torch.no_grad():
        theirs.offset.copy_(x.mean((0, 2, 3)).view(1, -1, 1, 1))
        wanted = theirs(x)
        mine = ours(layer, Layer(smoothing="ones", offset="zero"), bits)
        mine.input_offset.copy_(theirs.offset.flatten())
        mine.log_smooth.copy_(-theirs.scale_factor.flatten().log())
        for name, quantizer in (("weight", theirs.weight_quantizer_0), ("input", theirs.act_quantizer_0)):
            half = 2 ** (bits - 1)
            delta, zero = quantizer.set_param()
            for end, code in (("lower", -half), ("upper", half - 1)):
                getattr(mine, f"{name}_{end}").copy_(((code + zero) * delta).squeeze())
        return {"output": difference(mine(x), wanted.float())}


def compare_svdquant(folder: Path, bits: int) -> dict[str, float]:
    """A weight in groups of 64 input channels on the symmetric grid, rounded to the nearest."""
    extension = types.ModuleType("deepcompressor.csrc.load")  # compiled for CUDA, and for floating-point codes only
    extension._C = None
    sys.modules[extension.__name__] = extension
    load(folder, "deepcompressor.quantizer.impl.simple")
    simple = sys.modules["deepcompressor.quantizer.impl.simple"].simple_quantize
    dtype = sys.modules["deepcompressor.data.dtype"].QuantDataType
    layer, _ = example()
    weight = layer.weight.detach()[:, :64, 0, 0]
    kind = dtype(bits, signed=True)
    scale = weight.abs().amax(1, keepdim=True) / kind.max_value
    wanted = simple(weight / scale, quant_dtype=kind, has_zero_point=False) * scale
    return {"quantized weight": difference(quantize_groups(weight, 1, 64, bits), wanted)}


COMPARED = {
    "lsq": compare_lsq,
    "efficientdm": compare_efficientdm,
    "passionsr": compare_passionsr,
    "deepcompressor": compare_svdquant,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in COMPARED:
        parser.add_argument(f"--{name}", type=Path, metavar="CHECKOUT")


def measure(args: argparse.Namespace) -> Result:
    """A row for each quantizer and bit width."""
    given = {name: getattr(args, name) for name in COMPARED if getattr(args, name)}
    if not given:
        raise ValueError(f"give at least one checkout, of {', '.join('--' + name for name in COMPARED)}")
    rows = [
        {"quantizer": name, "bits": f"{bits} bits", **COMPARED[name](folder, bits)}
        for name, folder in given.items()
        for bits in BITS
    ]
    return Result("released-quantizers", {}, rows)


def table(result: Result) -> str:
    """Markdown."""
    rows = [
        [f"{row['quantizer']}, {row['bits']}", what, f"{value:.1e}"]
        for row in result.rows
        for what, value in row.items()
        if what not in ("quantizer", "bits")
    ]
    return markdown(["quantizer", "what", "largest relative difference"], rows)
