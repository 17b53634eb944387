"""What a model costs: bits a weight as stored, and multiplications as run. The one definition; docs/stored_format.md, section 9.

Everything is computed from the models themselves: tensors as they are stored, and multiplications by running the same network
without values (on PyTorch's meta device). Reports, cards and the choice of bits and ranks all count with what is here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, ConfigMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.diffusers_quantizer import attached_scheme
from qartsr_pipeline.quantization.fold import FoldedConstant

SIDE = 512  # pixels of the image that multiplications are counted for
BRANCH, FLOAT = "branch", "float"
ST_DTYPES = {
    torch.int8: "I8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.float64: "F64",
}
Layer = nn.Linear | nn.Conv2d | DeployedLayer


def stored_bytes(tensors: Mapping[str, torch.Tensor], behind: int = 0) -> int:
    """Bytes of the safetensors file that holds these tensors, its header included; in one file, without further metadata.

    Args:
        behind: as many bytes of other tensors lie before them, which are not counted; offsets in the header are longer then.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = behind
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = ST_DTYPES.get(tensor.dtype, str(tensor.dtype))
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + end - behind


@dataclass(frozen=True)
class Positions:
    """How often a layer is applied for one image.

    Attributes:
        inputs, outputs: positions (pixels, or tokens) that it reads and writes.
    """

    inputs: int
    outputs: int

    def multiplications(self, weights: int) -> int:
        """Of a layer with so many weights."""
        return self.outputs * weights

    def branch_multiplications(self, outputs: int, inputs: int, taps: int) -> int:
        """Of a branch beside a layer of this shape, for each rank."""
        return self.inputs * inputs + self.outputs * outputs * taps


@dataclass(frozen=True)
class Work:
    """What the full-precision network consists of and does for one image, whatever the bits.

    Attributes:
        parameters: of the UNet and the VAE before anything was folded.
        layers: "component.layer" -> its positions and number of weights, for every layer that runs.
        products: multiplications of attention, queries by keys and weights by values.
    """

    parameters: int
    layers: dict[str, tuple[Positions, int]]
    products: int


@dataclass(frozen=True)
class Accounting:
    """What UNet and VAE cost together.

    Attributes:
        stated: bits that the model is called by, such as "w4a4"; None where nothing is quantized.
        parameters: of the full-precision UNet and VAE, before anything was folded.
        stored: bytes of their weight files.
        codes: bytes of these that are packed codes.
        branches: bytes of these that are low-rank branches.
        code_weights: weights that the codes stand for.
        multiplications: for one image of 512 x 512 pixels without tiles, by what computes them: "w4a4" and the like for products
            of codes, "branch" for 16-bit branches, "float" for layers that are not quantized and attention's two products.
    """

    stated: str | None
    parameters: int
    stored: int
    codes: int
    branches: int
    code_weights: int
    multiplications: dict[str, int]

    @property
    def bits(self) -> float:
        """Bits a weight of the folder: of the weight files, for each parameter of the full-precision models."""
        return 8 * self.stored / self.parameters

    @property
    def code_bits(self) -> float:
        """Bits of a code, averaged over all quantized weights; 0 without any."""
        return 8 * self.codes / self.code_weights if self.code_weights else 0.0

    def shares(self) -> dict[str, float]:
        """Share of all multiplications: "stated" (of codes at the stated bits), "wider" (at others, such as 8), "branch" and
        "float"; they add up to 1.
        """
        total = sum(self.multiplications.values()) or 1
        counts = {"stated": 0, "wider": 0, BRANCH: 0, FLOAT: 0}
        for kind, count in self.multiplications.items():
            counts[kind if kind in counts else "stated" if kind == self.stated else "wider"] += count
        return {name: count / total for name, count in counts.items()}

    @property
    def branch_cost(self) -> float:
        """What branches add to the multiplications of the quantized layers, as a share of those."""
        codes = sum(count for kind, count in self.multiplications.items() if kind not in (BRANCH, FLOAT))
        return self.multiplications.get(BRANCH, 0) / max(codes, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the attributes, and what follows from them."""
        shares = {name: round(share, 4) for name, share in self.shares().items()}
        return {
            "stated_bits": self.stated,
            "bits_a_weight": round(self.bits, 3),
            "bits_a_code": round(self.code_bits, 3),
            "parameters": self.parameters,
            "bytes": {"files": self.stored, "codes": self.codes, "branches": self.branches},
            "multiplications": self.multiplications,
            "shares": shares,
            "branch_cost": round(self.branch_cost, 4),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Accounting:
        """Reads what `to_dict` wrote."""
        size, bits = data["bytes"], data["bits_a_code"]
        weights = round(8 * size["codes"] / bits) if bits else 0
        counts = dict(data["multiplications"])
        return cls(data["stated_bits"], data["parameters"], size["files"], size["codes"], size["branches"], weights, counts)

    def sentences(self) -> tuple[str, str]:
        """Bits and multiplications, each as a line of text."""
        share = self.stored or 1
        parts = f"codes {self.codes / share:.0%}, branches {self.branches / share:.0%} of it"
        bits = f"{self.bits:.2f} ({parts}; {self.code_bits:.2f} bits a code)" if self.stated else f"{self.bits:.2f}"
        total = sum(self.multiplications.values()) or 1
        names = {BRANCH: "16-bit branches", FLOAT: "float"}
        kinds = sorted(self.multiplications, key=lambda kind: (kind in names, kind != self.stated, kind))
        text = ", ".join(f"{self.multiplications[kind] / total:.1%} {names.get(kind, kind.upper())}" for kind in kinds)
        added = f"; branches add {self.branch_cost:.1%}" if self.multiplications.get(BRANCH) else ""
        return bits, text + added


def account(unet: UNet2DConditionModel, vae: AutoencoderKL, files: Iterable[int] = ()) -> Accounting:
    """What a UNet and a VAE cost, quantized or not.

    Args:
        files: sizes of their weight files in bytes; none for those that saving them would write.
    """
    return accounting_of({"unet": unet, "vae": vae}, work_of(unet, vae), files)


def accounting_of(models: Mapping[str, nn.Module], work: Work, files: Iterable[int] = ()) -> Accounting:
    """What the models of a pipeline, component -> model, cost for that work; ``files`` as for `account`."""
    deployed = {f"{c}.{n}": m for c, model in models.items() for n, m in model.named_modules() if isinstance(m, DeployedLayer)}
    counts: Counter[str] = Counter({FLOAT: work.products})
    for name, (position, weights) in work.layers.items():
        layer = deployed.get(name)
        counts[kind_of(layer) if layer is not None else FLOAT] += position.multiplications(weights)
        if layer is not None and layer.spec.rank:
            spec = layer.spec
            each = position.branch_multiplications(spec.out_channels, spec.in_channels, spec.taps)
            counts[BRANCH] += spec.rank * each
    coded = [layer for layer in deployed.values() if layer.spec.weight_bits < 16]
    return Accounting(
        stated=stated_bits(*models.values()),
        parameters=work.parameters,
        stored=sum(files) or sum(stored_bytes(model.state_dict()) for model in models.values()),
        codes=sum(layer.weight_packed.numel() for layer in coded),
        branches=sum(2 * (m.branch_up.numel() + m.branch_down.numel()) for m in deployed.values() if m.spec.rank),
        code_weights=sum(layer.spec.out_channels * layer.spec.in_channels * layer.spec.taps for layer in coded),
        multiplications={kind: count for kind, count in counts.items() if count},
    )


def work_of(unet: UNet2DConditionModel, vae: AutoencoderKL) -> Work:
    """Of a UNet, folded or not, and a VAE, quantized or not."""
    twins = {"unet": unquantized_twin(unet), "vae": unquantized_twin(vae)}
    folded = {f"unet.{name}" for name, module in unet.named_modules() if isinstance(module, FoldedConstant)}
    layers, products = run_on_meta(twins["unet"], twins["vae"], folded)
    return Work(sum(p.numel() for twin in twins.values() for p in twin.parameters()), layers, products)


def kind_of(layer: DeployedLayer) -> str:
    """How the product of a deployed layer is computed: "w4a4" and the like, or "float" where an operand is no code."""
    bits = (layer.spec.weight_bits, layer.spec.activation_bits)
    return FLOAT if max(bits) == 16 else "w{}a{}".format(*bits)


def stated_bits(*models: nn.Module) -> str | None:
    """The bits that a pipeline is called by: those of the layers without an override, in the first model that is quantized."""
    schemes = [scheme for scheme in map(attached_scheme, models) if scheme is not None]
    return f"w{schemes[0].default.weight_bits}a{schemes[0].default.activation_bits}" if schemes else None


def unquantized_twin(model: nn.Module) -> nn.Module:
    """The full-precision model of the same configuration, without values, on the meta device."""
    kind = cast(type[ConfigMixin], type(model))
    config = {name: value for name, value in cast(Any, model).config.items() if name != "quantization_config"}
    with torch.device("meta"):
        return cast(nn.Module, kind.from_config(config)).eval()


@torch.no_grad()
def run_on_meta(
    unet: nn.Module, vae: nn.Module, folded: Iterable[str] = (), side: int = SIDE
) -> tuple[dict[str, tuple[Positions, int]], int]:
    """Runs encoder, UNet and decoder on one image of ``side`` x ``side`` pixels.

    Args:
        unet, vae: on the meta device.
        folded: "unet.name" of modules whose output is a constant: neither they nor what is in them is counted.

    Returns:
        "component.layer" -> its positions and its number of weights, for every layer that runs; and the multiplications of all
        attention products, queries by keys and weights by values.
    """
    found: dict[str, tuple[Positions, int]] = {}
    products = 0
    constant = tuple(folded)

    def watch_layer(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found[name] = Positions(positions_of(inputs[0]), positions_of(output)), cast(Any, module).weight.numel()

        return hook

    def watch_attention(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal products
        hidden = given[0] if given else named["hidden_states"]
        other = named.get("encoder_hidden_states", given[1] if len(given) > 1 else None)
        keys = hidden if other is None else other
        products += 2 * positions_of(hidden) * positions_of(keys) * cast(Any, module).inner_dim

    with ExitStack() as hooks, torch.device("meta"):
        for component, model in (("unet", unet), ("vae", vae)):
            for name, module in model.named_modules():
                path = f"{component}.{name}"
                if isinstance(module, (nn.Linear, nn.Conv2d)) and not _is_in(path, constant):
                    hooks.callback(module.register_forward_hook(watch_layer(path)).remove)
                elif isinstance(module, Attention):
                    hooks.callback(module.register_forward_pre_hook(watch_attention, with_kwargs=True).remove)
        network = cast(Any, vae)
        latents = network.encode(torch.empty(1, 3, side, side)).latent_dist.mode()
        prompt = torch.empty(1, 77, cast(Any, unet).config.cross_attention_dim)
        network.decode(unet(latents, 0, encoder_hidden_states=prompt).sample)
    return found, products


def _is_in(path: str, folded: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in folded)


def positions_of(tensor: torch.Tensor) -> int:
    """Of one image or clip: pixels of (1, C, H, W) or (1, C, F, H, W), or tokens of (1, ..., C)."""
    return tensor.numel() // tensor.shape[1 if tensor.dim() in (4, 5) else -1]
