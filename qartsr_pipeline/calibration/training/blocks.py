"""The modules that are quantized one after another: blocks of UNet and VAE, in the order in which they run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import CalibratingMixin, calibrating_layers

BLOCKS = (ResnetBlock2D, Transformer2DModel, Attention, Downsample2D, Upsample2D)
PARTS = ("encoder", "unet", "decoder")


@dataclass(frozen=True)
class Block:
    """A ResNet block, transformer block, sampler, or a layer outside of these, such as the first and the last.

    Attributes:
        name: "unet." or "vae." and the qualified name.
        part: one of `PARTS`.
        layers: its calibrating layers, at least one.
    """

    name: str
    part: str
    module: nn.Module
    layers: tuple[CalibratingMixin, ...]

    def quantize(self, quantizing: bool) -> None:
        """Whether the block's layers simulate quantization, or compute what they did before."""
        for layer in self.layers:
            layer.quantizing = quantizing


def part_of(name: str) -> str:
    """ "vae.post_quant_conv" -> "decoder"."""
    if name.startswith("unet."):
        return "unet"
    return "encoder" if name.startswith(("vae.encoder.", "vae.quant_conv")) else "decoder"


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> the outermost block around each calibrating layer, or the layer itself."""
    found = {}
    for name in calibrating_layers(model):
        parents = [".".join(name.split(".")[: depth + 1]) for depth in range(name.count("."))]
        outer = next((parent for parent in parents if isinstance(model.get_submodule(parent), BLOCKS)), name)
        found[outer] = model.get_submodule(outer)
    return found


def _layers(module: nn.Module) -> tuple[CalibratingMixin, ...]:
    return tuple(layer for layer in module.modules() if isinstance(layer, CalibratingMixin))


@torch.no_grad()
def find_blocks(pipeline: QArtSRPipeline) -> list[Block]:
    """All blocks of a pipeline with calibrating layers, in the order of their first call on a small picture.

    Raises:
        ValueError: if a block is never called: it would never be calibrated.
    """
    candidates = {
        f"{component}.{name}": module
        for component in ("vae", "unet")
        for name, module in _candidates(getattr(pipeline, component)).items()
    }
    called: list[str] = []

    def note(name: str) -> None:
        if name not in called:
            called.append(name)

    handles = [module.register_forward_pre_hook(lambda *_, name=name: note(name)) for name, module in candidates.items()]
    try:
        network = pipeline.network()
        side = 2 * pipeline.multiple
        network.decode(network.step(network.encode(torch.zeros(1, 3, side, side, dtype=pipeline.vae.dtype))))
    finally:
        for handle in handles:
            handle.remove()
    missing = candidates.keys() - set(called)
    if missing:
        raise ValueError(f"the blocks {', '.join(sorted(missing))} do not run: leave them out with keep: PATTERN: w16a16")
    return [Block(name, part_of(name), candidates[name], _layers(candidates[name])) for name in called]


@dataclass(frozen=True)
class Turn:
    """The blocks that are quantized and trained together, one after the other turn."""

    name: str
    blocks: tuple[Block, ...]


def distributed(count: int) -> list[int]:
    """0 .. count - 1 in such an order that the ones so far are spread evenly: the middle of the largest gap is next."""
    order: list[int] = []
    gaps = [(0, count)]
    while gaps:
        start, end = max(gaps, key=lambda gap: (gap[1] - gap[0], -gap[0]))
        gaps.remove((start, end))
        middle = (start + end) // 2
        order.append(middle)
        gaps += [gap for gap in ((start, middle), (middle + 1, end)) if gap[0] < gap[1]]
    return order


def turns(blocks: list[Block], modules: str, order: str) -> list[Turn]:
    """Who has a turn, in order.

    Args:
        blocks: in the order in which they run.
        modules, order: see `recipe.Stage`.
    """
    if modules == "all":
        return [Turn("all", tuple(blocks))]
    if modules == "parts":
        groups = [Turn(part, tuple(block for block in blocks if block.part == part)) for part in PARTS]
        groups = [turn for turn in groups if turn.blocks]
    else:
        groups = [Turn(block.name, (block,)) for block in blocks]
    indices = {
        "forward": lambda: range(len(groups)),
        "reversed": lambda: reversed(range(len(groups))),
        "distributed": lambda: distributed(len(groups)),
    }[order]()
    return [groups[index] for index in indices]
