"""Folding of everything that depends only on the timestep and the prompt: exact, and done before quantization.

A one-step model always runs at one timestep T with one prompt embedding c. So the time embedding, every ResNet block's
``time_emb_proj`` and every cross-attention's ``to_k`` and ``to_v`` always give the same output. `fold` computes those outputs
once, in the weights' own precision, and puts the constants where the layers were: fewer weights, without quantization error.
"""

from __future__ import annotations

from typing import cast

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from qartsr_pipeline.quantization.scheme import Folding, replace_module


class FoldedConstant(nn.Module):
    """Gives its constant for each element of the input's batch.

    Buffer ``value``: shape (1, ...), the replaced layer's output for a batch of one.
    """

    value: torch.Tensor

    def __init__(self, value: torch.Tensor):
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: torch.Tensor, *args: object) -> torch.Tensor:
        return self.value.expand(x.shape[0], *self.value.shape[1:])


def _check_foldable(unet: UNet2DConditionModel) -> None:
    extras = ("class_embedding", "add_embedding", "encoder_hid_proj", "time_embed_act")
    found = [name for name in extras if getattr(unet, name, None) is not None]
    if found:
        raise ValueError(f"this UNet has {', '.join(found)}; folding knows only timestep and prompt. Quantize it without folding")


def _prompt_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Qualified name -> layer, of every layer that reads the prompt."""
    layers: dict[str, nn.Linear] = {}
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            if module.norm_cross is not None or module.added_kv_proj_dim is not None:
                raise ValueError(f"the cross-attention {name!r} changes its keys' input; folding does not know how")
            layers |= {f"{name}.to_k": module.to_k, f"{name}.to_v": module.to_v}
    return layers


def _time_layers(unet: nn.Module) -> dict[str, nn.Linear]:
    """Qualified name -> layer, of every block's projection of the time embedding."""
    return {n: m for n, m in unet.named_modules() if n.endswith("time_emb_proj") and isinstance(m, nn.Linear)}


@torch.no_grad()
def fold(unet: UNet2DConditionModel, timestep: int, prompt_embeds: torch.Tensor) -> Folding:
    """Folds in place. Afterwards the UNet ignores the timestep and the prompt that it is called with.

    Args:
        timestep: T.
        prompt_embeds: shape (1, tokens, cross_attention_dim).

    Returns:
        What to record in the model's `QuantizationScheme`.

    Raises:
        ValueError: for a UNet with other conditioning (class labels, added embeddings).
    """
    _check_foldable(unet)
    prompt_layers = _prompt_layers(unet)  # checks too, so before anything is changed
    weight = unet.conv_in.weight
    sinusoid = unet.time_proj(torch.tensor([timestep], device=weight.device)).to(weight.dtype)
    embedding = unet.time_embedding(sinusoid)  # (1, time_embed_dim)
    for name, layer in _time_layers(unet).items():
        block = cast(ResnetBlock2D, unet.get_submodule(name.rpartition(".")[0]))
        activated = embedding if block.skip_time_act else block.nonlinearity(embedding)
        replace_module(unet, name, FoldedConstant(layer(activated)))
    for name, layer in prompt_layers.items():
        replace_module(unet, name, FoldedConstant(layer(prompt_embeds.to(weight.device, weight.dtype))))
    replace_module(unet, "time_embedding", FoldedConstant(embedding[:, :1].clone()))  # only its batch size is ever used
    return Folding(int(timestep), prompt_embeds.shape[1])


def fold_structure(unet: UNet2DConditionModel, folding: Folding) -> None:
    """Gives a fresh (meta) UNet the folded structure, so that a folded checkpoint's keys find their place."""
    device = unet.conv_in.weight.device
    for name, layer in _time_layers(unet).items():
        replace_module(unet, name, FoldedConstant(torch.empty(1, layer.out_features, device=device)))
    for name, layer in _prompt_layers(unet).items():
        replace_module(unet, name, FoldedConstant(torch.empty(1, folding.tokens, layer.out_features, device=device)))
    replace_module(unet, "time_embedding", FoldedConstant(torch.empty(1, 1, device=device)))
