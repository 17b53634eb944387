"""The tiny model's tensors under the names of Stable Diffusion's original files: diffusers' translation, backwards."""

from __future__ import annotations

import torch

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_ENDS |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
# Two levels with one layer each going down and two going up; attention on the first level and in the middle.
UNET_BLOCKS = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
VAE_BLOCKS = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"}
VAE_BLOCKS |= {f"down_blocks.{i}.resnets.0": f"down.{i}.block.0" for i in range(2)}
VAE_BLOCKS |= {f"up_blocks.{i}.resnets.{j}": f"up.{1 - i}.block.{j}" for i in range(2) for j in range(2)}
VAE_BLOCKS |= {"down_blocks.0.downsamplers.0": "down.0.downsample", "up_blocks.0.upsamplers.0": "up.1.upsample"}
VAE_BLOCKS |= {f"mid_block.resnets.{i}": f"mid.block_{i + 1}" for i in range(2)} | {"mid_block.attentions.0": "mid.attn_1"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
TEXT |= {"self_attn.out_proj": "attn.out_proj", "encoder.layers": "resblocks"}


def original_names(parts) -> dict[str, torch.Tensor]:
    """All tensors of UNet, VAE and text encoder as one single file holds them."""
    return {
        **{f"model.diffusion_model.{unet_name(key)}": value for key, value in parts.unet.state_dict().items()},
        **{f"first_stage_model.{key}": value for key, value in _vae(parts.vae.state_dict())},
        **{f"cond_stage_model.model.{key}": value for key, value in _text(parts.text_encoder.state_dict()).items()},
    }


def unet_name(key: str) -> str:
    key = _replaced(key, UNET_BLOCKS | UNET_ENDS)
    return key if "transformer_blocks" in key else _replaced(key, RESNET)


def _vae(state):
    for key, value in state.items():
        name = _replaced(key, VAE_BLOCKS)
        if ".attn_1." in name:
            name = _replaced(name, VAE_ATTENTION)
            if value.ndim == 2:
                value = value[:, :, None, None]  # attention was made of 1 x 1 convolutions
        yield name, value


def _text(state):
    state = {key.removeprefix("text_model."): value for key, value in state.items() if "position_ids" not in key}
    found = {
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": torch.zeros(12, 12),
        "logit_scale": torch.ones(()),
    }
    for kind in ("weight", "bias"):
        for layer in range(2):
            keys = [f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat([state.pop(key) for key in keys])
    return found | {f"transformer.{_replaced(key, TEXT)}": value for key, value in state.items()}


def _replaced(key: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        if f".{key}".startswith(f".{new}.") or f".{new}." in f".{key}":
            key = f".{key}".replace(f".{new}.", f".{old}.", 1)[1:]
    return key
