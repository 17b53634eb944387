"""WAN's original names, as its published code has them: diffusers' translation, backwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

TRANSFORMER = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    ".norm2.": ".norm3.",  # the only norm of a block with weights
    ".ffn.net.0.proj.": ".ffn.0.",
    ".ffn.net.2.": ".ffn.2.",
    ".scale_shift_table": ".modulation",
}
TRANSFORMER |= {
    f".attn{number}.{ours}.": f".{kind}_attn.{theirs}."
    for number, kind in ((1, "self"), (2, "cross"))
    for ours, theirs in (
        *(("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")),
        *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
    )
}
RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


def transformer_name(key: str) -> str:
    if key == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in TRANSFORMER.items():
        key = key.replace(ours, theirs)
    return key


def vae_name(key: str) -> str:
    key = key.replace("post_quant_conv.", "conv2.").replace("quant_conv.", "conv1.")
    part, *rest = key.split(".")
    if part not in ("encoder", "decoder"):
        return key
    if rest[0] in ENDS:
        return ".".join([part, ENDS[rest[0]], *rest[1:]])
    if rest[0] == "mid_block":
        place = 1 if rest[1] == "attentions" else 2 * int(rest[2])
        return ".".join([part, "middle", str(place), *(_residual(rest[3:]) if rest[1] == "resnets" else rest[3:])])
    if part == "encoder":  # diffusers counts its blocks as WAN does
        return ".".join([part, "downsamples", rest[1], *_residual(rest[2:])])
    place = 4 * int(rest[1]) + (int(rest[3]) if rest[2] == "resnets" else 3)
    return ".".join([part, "upsamples", str(place), *_residual(rest[4:])])


def _residual(parts: list[str]) -> list[str]:
    return [RESIDUAL.get(parts[0], parts[0]), *parts[1:]]


def original(state: dict[str, torch.Tensor], name: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """The tensors under WAN's names."""
    return {name(key): tensor.contiguous() for key, tensor in state.items()}


def wan_transformer() -> WanTransformer3DModel:
    """WAN's structure with one head and two blocks; the same weights each time."""
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
    ).eval()


def wan_autoencoder() -> AutoencoderKLWan:
    """WAN's structure with few channels; the same weights each time."""
    torch.manual_seed(1)
    return AutoencoderKLWan(base_dim=4).eval()
