"""Merges low-rank adapters (LoRA, arXiv 2106.09685) into a WAN transformer, whatever program named them.

A layer is called by diffusers' name (`blocks.0.attn1.to_q`), by WAN's own (`blocks.0.self_attn.q`), or by the latter with
underscores, as Kohya's programs have it (`lora_unet_blocks_0_self_attn_q`). Its adapter is W + (alpha / rank) B A:

    .lora_A.weight, .lora_down.weight     A (rank, in)
    .lora_B.weight, .lora_up.weight       B (out, rank)
    .alpha                                one number; without it alpha / rank is 1
    .diff, .diff_b                        added to weight and bias as they are
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import nn

from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.checkpoint_files.weight_files import check_safetensors

# diffusers' names -> WAN's, in this order
_ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    ".attn1.": ".self_attn.",
    ".attn2.": ".cross_attn.",
    ".to_out.0": ".o",
    ".to_q": ".q",
    ".to_k": ".k",
    ".to_v": ".v",
    ".ffn.net.0.proj": ".ffn.0",
    ".ffn.net.2": ".ffn.2",
    "proj_out": "head.head",
}
_PREFIX = re.compile(r"^(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.|lora_unet_)?")
_KEY = re.compile(
    r"(?P<layer>.+)\.(?P<part>lora_A(\.default)?\.weight|lora_B(\.default)?\.weight|lora_down\.weight|lora_up\.weight"
    r"|alpha|diff|diff_b)"
)
_PARTS = {"lora_down": "lora_A", "lora_up": "lora_B"}


@torch.no_grad()
def merge_lora(transformer: WanTransformer3DModel, path: Path) -> int:
    """Adds a file's adapters to the weights, in place and in float32; returns how many layers had one.

    Raises:
        CheckpointError: not such a file, or it is for another model; the transformer is unchanged.
    """
    layers: dict[str, nn.Module] = {
        alias: module
        for name, module in transformer.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv3d))
        for alias in _names_of(name)
    }
    found: dict[nn.Module, dict[str, torch.Tensor]] = {}
    unknown = []
    check_safetensors(path, str(path))
    for key, tensor in load_file(path).items():
        match = _KEY.fullmatch(_PREFIX.sub("", key))
        module = layers.get(match["layer"]) if match else None
        if match is None or module is None:
            unknown.append(key)
            continue
        part = match["part"].split(".")[0]
        found.setdefault(module, {})[_PARTS.get(part, part)] = tensor.float()
    if unknown:
        raise CheckpointError(
            f"{path} is for another model, or for more than its transformer: it names {unknown[0]} ({len(unknown)} such tensors),"
            " which this one does not have. Give adapters of a WAN transformer of this size."
        )
    changes = [(module, *_change(path, module, parts)) for module, parts in found.items()]
    if not changes:
        raise CheckpointError(f"{path} holds no adapters.")
    for layer, weight, bias in changes:
        layer.get_parameter("weight").add_(weight)
        if bias is not None:
            layer.get_parameter("bias").add_(bias)
    return len(changes)


def _names_of(name: str) -> set[str]:
    """A layer's names in files of adapters."""
    original = name
    for ours, theirs in _ORIGINAL.items():
        original = original.replace(ours, theirs)
    return {name, original, name.replace(".", "_"), original.replace(".", "_")}


def _change(path: Path, module: nn.Module, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is added to weight and bias."""
    weight = module.get_parameter("weight")
    bias = module.get_parameter("bias") if isinstance(module, (nn.Linear, nn.Conv3d)) and module.bias is not None else None
    change = torch.zeros_like(weight)
    try:
        if "lora_A" in parts or "lora_B" in parts:
            down, up = parts["lora_A"].flatten(1), parts["lora_B"].flatten(1)
            factor = float(parts["alpha"]) / len(down) if "alpha" in parts else 1.0
            change += (factor * (up @ down)).view(weight.shape)
        if "diff" in parts:
            change += parts["diff"].view(weight.shape)
        added = parts["diff_b"].view(bias.shape) if "diff_b" in parts and bias is not None else None
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(
            f"{path} does not fit a layer of {tuple(weight.shape)} ({reason}). Give adapters of a WAN transformer of this size."
        ) from error
    if not bool(torch.isfinite(change).all()):
        raise CheckpointError(f"{path} holds NaN or infinity. Download it again.")
    return change, added
