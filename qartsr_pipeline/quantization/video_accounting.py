"""What a video model does for one clip: multiplications of its layers and of attention, counted on PyTorch's meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from qartsr_pipeline.quantization.accounting import (
    Accounting,
    Positions,
    Work,
    accounting_of,
    positions_of,
    unquantized_twin,
)
from qartsr_pipeline.quantization.fold_wan import FoldedConditions
from qartsr_pipeline.quantization.frames_as_channels import ConvolutionOverFrames

FRAMES, SIDE = 5, 96  # of the tile that work is counted for, unless another is named
FOLDED = ("condition_embedder", "attn2.to_k", "attn2.to_v")


def account_of_clip(
    transformer: WanTransformer3DModel,
    vae: AutoencoderKLWan,
    files: Iterable[int] = (),
    frames: int = FRAMES,
    side: int = SIDE,
) -> Accounting:
    """What a transformer and an autoencoder cost, quantized or not; ``files`` as for `accounting.account`, the rest as below."""
    return accounting_of({"transformer": transformer, "vae": vae}, work_of_clip(transformer, vae, frames, side), files)


@torch.no_grad()
def work_of_clip(transformer: WanTransformer3DModel, vae: AutoencoderKLWan, frames: int = FRAMES, side: int = SIDE) -> Work:
    """For one tile of ``frames`` frames of ``side`` x ``side`` pixels. The models may be quantized and folded.

    Only attention's share depends on the tile's size: everything else grows with the number of pixels.
    """
    twins = {"transformer": unquantized_twin(transformer), "vae": unquantized_twin(vae)}
    stored = {f"vae.{name}" for name, module in vae.named_modules() if isinstance(module, ConvolutionOverFrames)}
    folded = FOLDED if isinstance(transformer.condition_embedder, FoldedConditions) else ()
    layers: dict[str, tuple[Positions, int]] = {}
    products = 0

    def watch_layer(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            before = layers.get(name, (Positions(0, 0), 0))[0]  # the autoencoder goes through its layers group by group
            positions = Positions(before.inputs + positions_of(inputs[0]), before.outputs + positions_of(output))
            layers[name] = positions, module.weight.numel()

        return hook

    def watch_attention(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal products
        hidden = given[0] if given else named["hidden_states"]
        other = named.get("encoder_hidden_states", given[1] if len(given) > 1 else None)
        keys = hidden if other is None else other
        products += 2 * positions_of(hidden) * positions_of(keys) * module.inner_dim

    with ExitStack() as hooks, torch.device("meta"):
        for component, model in twins.items():
            for name, module in model.named_modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) and not any(part in name for part in folded):
                    full = f"{component}.{name}"
                    hooks.callback(module.register_forward_hook(watch_layer(f"{full}.conv" if full in stored else full)).remove)
                elif isinstance(module, WanAttention):
                    hooks.callback(module.register_forward_pre_hook(watch_attention, with_kwargs=True).remove)
        network, stepper = cast(Any, twins["vae"]), cast(Any, twins["transformer"])
        latents = network.encode(torch.empty(1, 3, frames, side, side)).latent_dist.mode()
        prompt = torch.empty(1, 1, transformer.config["text_dim"])
        stepper(latents, torch.zeros(1, dtype=torch.long), prompt, return_dict=False)
        network.decode(latents)
    return Work(sum(p.numel() for twin in twins.values() for p in twin.parameters()), layers, products)
