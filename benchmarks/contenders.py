"""What `benchmarks.speed` times: peers and ours, each a function that builds a network ready to run.

Shape `tiny` are the models that ship. Shape `sd21` is Stable Diffusion 2.1-base's with random weights, quantized without data:
its pictures are noise, and only its seconds and bytes mean something. torchao and sdnq get a model in bfloat16 where the
processor computes with it, else in float32.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.arithmetic.affine import affine_parameters, centred_codes
from qartsr_pipeline.arithmetic.packing import pack
from qartsr_pipeline.cli.device import choose_dtype
from qartsr_pipeline.convert import stable_diffusion_2_1
from qartsr_pipeline.freed_memory import keep_freed_memory
from qartsr_pipeline.kernels.cpu import dtype_on_cpu
from qartsr_pipeline.kernels.stored_layer import LOW_MEMORY_VARIABLE
from qartsr_pipeline.one_step import OneStepNetwork
from qartsr_pipeline.quantization.deployed import DeployedLayer, deployed_like
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.fuse import fuse
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme, quantizable_layers, replace_module

TIMESTEP = {"tiny": 100, "sd21": 999}
# The ranks of the models that ship: 8, and wide ones where the whole signal passes. First and last layers have 8 bits.
RANKS = {
    "vae.decoder.*upsamplers.0.conv": 24, "vae.*samplers*": 32, "vae.*conv_shortcut": 64, "vae.*quant_conv": 64,
    "vae.encoder.conv_out": 64, "vae.decoder.conv_in": 24, "*": 8,
}  # fmt: skip
EIGHT_BITS = ("unet.conv_in", "unet.conv_out", "vae.encoder.conv_in", "vae.decoder.conv_out")


def full_precision(shape: str) -> OneStepNetwork:
    """The network in float32."""
    if shape == "tiny":
        return QArtSRPipeline.from_pretrained("tiny-fp").network()
    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**stable_diffusion_2_1.UNET), AutoencoderKL(**stable_diffusion_2_1.VAE)
    prompt = torch.randn(1, 77, stable_diffusion_2_1.UNET["cross_attention_dim"])
    return OneStepNetwork(unet.eval(), vae.eval(), prompt, TIMESTEP[shape], 0.0047, torch.device("cpu"))


def scheme_for(component: str, name: str, bits: int) -> LayerScheme:
    """Of one layer, as in the models that ship."""
    path = f"{component}.{name}"
    if path in EIGHT_BITS:
        return LayerScheme(8, 8)
    rank = next(rank for pattern, rank in RANKS.items() if fnmatchcase(path, pattern))
    return LayerScheme(bits, bits, 1 if bits == 8 and rank == 8 else rank)


@torch.no_grad()
def quantize_without_data(network: OneStepNetwork, bits: int, folded: bool = True) -> OneStepNetwork:
    """In place: weights rounded to the extremes of each row, input bounds guessed, branches random and small."""
    if folded:
        fold(network.unet, network.timestep, network.prompt_embeds)
    for component in ("unet", "vae"):
        model = getattr(network, component)
        for name, (layer, _) in quantizable_layers(model, QuantizationScheme(LayerScheme(bits, bits))).items():
            replace_module(model, name, _deployed(layer, scheme_for(component, name, bits)))
    return network


def _deployed(layer: nn.Module, scheme: LayerScheme) -> DeployedLayer:
    new, bits = deployed_like(layer, scheme), scheme.weight_bits
    weight = layer.weight.permute(0, 2, 3, 1) if layer.weight.dim() == 4 else layer.weight
    rows = weight.reshape(len(weight), -1).float()
    scale, zero_point = affine_parameters(rows.amin(1), rows.amax(1), bits, symmetric=bits == 8)
    codes = centred_codes(rows, 1 / scale[:, None], zero_point[:, None], bits, symmetric=bits == 8)
    if bits == 8:
        new.weight_packed.copy_(codes.to(torch.int8).view(torch.uint8))
    else:
        new.weight_packed.copy_(pack((codes + zero_point[:, None]).to(torch.int32), bits))
        new.weight_zero_point.copy_(zero_point)
    new.weight_scale.copy_(scale)
    new.input_scale.fill_(6 / 2**scheme.activation_bits)
    new.input_zero_point.fill_(2 ** (scheme.activation_bits - 1))
    new.smooth.fill_(1)
    for name in ("branch_down", "branch_up"):
        if new.get_buffer(name) is not None:
            new.get_buffer(name).normal_(std=1e-3)
    if layer.bias is not None:
        new.bias.copy_(layer.bias)
    return new


def shipped(shape: str, bits: int) -> OneStepNetwork:
    """As a loaded checkpoint is: folded, with its blocks exchanged."""
    if shape == "tiny":
        return QArtSRPipeline.from_pretrained(f"tiny-w{bits}a{bits}").network()
    return _fused(quantize_without_data(full_precision(shape), bits))


def _in(network: OneStepNetwork, device: str, dtype: torch.dtype | None = None) -> OneStepNetwork:
    for model in (network.unet, network.vae):
        model.to(device) if dtype is None else model.to(device, dtype)
    network.prompt_embeds = network.prompt_embeds.to(device, dtype or network.prompt_embeds.dtype)
    network.device = torch.device(device)
    return network


def _channels_last(network: OneStepNetwork) -> OneStepNetwork:
    for model in (network.unet, network.vae):
        model.to(memory_format=torch.channels_last)
    return network


def _compiled(network: OneStepNetwork) -> OneStepNetwork:
    network.unet = torch.compile(network.unet)
    for part in ("encoder", "decoder"):
        setattr(network.vae, part, torch.compile(getattr(network.vae, part)))
    return network


def _fused(network: OneStepNetwork) -> OneStepNetwork:
    fuse(network.unet)
    fuse(network.vae)
    return network


def _ours(network: OneStepNetwork, device: str) -> OneStepNetwork:
    """As the command line runs it: what is not quantized is in the float type that it chooses, freed memory is kept."""
    _kept_memory(network)
    dtype = choose_dtype("auto", device)[0]
    for model in (network.unet, network.vae):
        for module in model.modules():
            if not isinstance(module, DeployedLayer):  # whose tensors keep the dtypes that they are stored in
                module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
    network.prompt_embeds = network.prompt_embeds.to(dtype)
    return _in(network, device)


def _kept_memory(network: OneStepNetwork) -> OneStepNetwork:
    keep_freed_memory()  # in this contender's process
    return network


def _low_memory(network: OneStepNetwork) -> OneStepNetwork:
    os.environ[LOW_MEMORY_VARIABLE] = "1"  # of this contender's process
    return network


def _quanto(network: OneStepNetwork, bits: int) -> OneStepNetwork:
    from optimum import quanto

    for model in (network.unet, network.vae):
        quanto.quantize(model, weights=getattr(quanto, f"qint{bits}"))
        quanto.freeze(model)
    return network


def _torchao(network: OneStepNetwork) -> OneStepNetwork:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    for model in (network.unet, network.vae):
        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return network


def _sdnq(network: OneStepNetwork) -> OneStepNetwork:
    from sdnq import sdnq_post_load_quant

    options = {"weights_dtype": "int8", "use_quantized_matmul": True, "quant_conv": True, "use_quantized_matmul_conv": True}
    network.unet, network.vae = (sdnq_post_load_quant(model, **options) for model in (network.unet, network.vae))
    return network


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    Attributes:
        build: (shape, device) -> network.
        needs: package that must be installed.
        devices: where it is timed.
        listed: whether it is timed unless others are asked for by name.
    """

    build: Callable[[str, str], OneStepNetwork]
    needs: str = "torch"
    devices: tuple[str, ...] = ("cpu", "cuda")
    listed: bool = True

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def _fast_float(device: str) -> torch.dtype:
    return BF16 if device == "cuda" else dtype_on_cpu(BF16)


BF16 = torch.bfloat16
CONTENDERS: dict[str, Contender] = {
    "fp32": Contender(lambda s, d: _in(full_precision(s), d)),
    "fp32 channels-last": Contender(lambda s, d: _channels_last(_in(full_precision(s), d))),
    "fp16": Contender(lambda s, d: _in(full_precision(s), d, torch.float16), devices=("cuda",)),
    "bf16": Contender(lambda s, d: _in(full_precision(s), d, BF16)),
    "bf16 channels-last": Contender(lambda s, d: _channels_last(_in(full_precision(s), d, BF16))),
    "bf16 channels-last, kept memory": Contender(
        lambda s, d: _kept_memory(_channels_last(_in(full_precision(s), d, BF16))), listed=False
    ),
    "bf16 compiled": Contender(lambda s, d: _compiled(_in(full_precision(s), d, BF16)), listed=False),
    "quanto int8 weights": Contender(lambda s, d: _quanto(_in(full_precision(s), d), 8)),
    "quanto int4 weights": Contender(lambda s, d: _quanto(_in(full_precision(s), d), 4), listed=False),
    "torchao int8": Contender(lambda s, d: _torchao(_in(full_precision(s), d, _fast_float(d))), "torchao"),
    "sdnq int8": Contender(lambda s, d: _sdnq(_in(full_precision(s), d, _fast_float(d))), "sdnq"),
    **{f"ours W{bits}A{bits}": Contender(lambda s, d, bits=bits: _ours(shipped(s, bits), d)) for bits in (8, 4, 2)},
    **{
        f"ours W{bits}A{bits}, float32": Contender(lambda s, d, bits=bits: _kept_memory(_in(shipped(s, bits), d)), listed=False)
        for bits in (8, 4, 2)
    },
    **{
        f"ours W{bits}A{bits}, {how}": Contender(lambda s, d, bits=bits, make=make: _ours(make(s, bits), d), listed=False)
        for bits in (8, 4, 2)
        for how, make in (
            ("diffusers' blocks", lambda s, bits: quantize_without_data(full_precision(s), bits)),
            ("not folded", lambda s, bits: _fused(quantize_without_data(full_precision(s), bits, folded=False))),
        )
    },
    "ours W4A4, low memory": Contender(lambda s, d: _low_memory(_ours(shipped(s, 4), d)), listed=False),
    "ours W4A4, compiled": Contender(lambda s, d: _compiled(_ours(shipped(s, 4), d)), listed=False),
}
WITHOUT_DATA = [name for name in CONTENDERS if name.endswith(("blocks", "folded"))]  # whose error means nothing at any shape
