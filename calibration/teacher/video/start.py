"""The initial weights of the small video model: an autoencoder that is exact, and a transformer that does nothing yet.

Three properties of the classes are used for that:

* silu(x) - silu(-x) = x, so a value that a SiLU must not change is carried by two channels, as x and as -x;
* a root-mean-square norm is nearly constant where some channels are large constants ("anchors"), which no layer reads: behind the
  norm they are multiplied by zero. Their gradients are masked, or the brightness of the whole frame would change in every step;
* residual branches that end in zeros do nothing at first, as do temporal taps of zero: a causal convolution then sees one frame.

The attention in the middle of encoder and decoder is off: its output projection is zero and is not trained. Over a whole image it
would cost more than all else, and what it learned on small patches would not hold there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanRMS_norm
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn

BLOCK = 4  # side of a block of pixels, and the enlargement
LATENTS = 24
ANCHORS = 8  # constant channels, the last ones of every tensor that is normalized
# Latents are coefficients divided by these, so that fine detail is seen: about the 0.6th power of the standard deviations that
# photographs in [-1, 1] have, so that edges are no outliers. Luma row by row, then both colour differences. The means of blocks
# (the first of each) become smaller still, because the norms of the decoder should not depend on them.
SCALES = (
    (4.0, 0.33, 0.25, 0.2, 0.33, 0.2, 0.17, 0.13, 0.25, 0.17, 0.13, 0.11, 0.2, 0.13, 0.11, 0.09)
    + (1.0, 0.12, 0.12, 0.08)
    + (1.2, 0.16, 0.16, 0.1)
)
GAIN = 2.5  # weight of the norms in residual branches: SiLU is nearly linear on small values
CONTRAST = 6.0  # up to so many times the usual contrast, the transformer is about linear in it
SHARP_PAIRS = 3  # pairs of channels of each axis that find the position: those that turn fastest
SHARPNESS = 2.0
OFFSETS = (  # frame, row, column of the tokens that the heads of a block look at when training starts
    ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0)),
    ((-1, 0, 0), (1, 0, 0), (0, -1, -1), (0, 1, 1)),
    ((0, 0, -1), (0, 0, 1), (0, -1, 0), (0, 1, 0)),
    ((-1, 0, 0), (1, 0, 0), (0, -1, 1), (0, 1, -1)),
)
CARRIED = 0.5  # latents are carried through the norm at this size, small beside the anchors
LUMA = (0.299, 0.587, 0.114)  # BT.601
BLUE, RED = 0.564, 0.713  # of its colour differences


def cosine_transform() -> tuple[torch.Tensor, torch.Tensor]:
    """Encoding (24, 48) and decoding (48, 24) matrices; the 48 are ordered as diffusers' ``patchify`` orders them.

    Decoding undoes encoding but for the chroma of the finest details.
    """
    position, frequency = torch.arange(BLOCK), torch.arange(BLOCK)[:, None]
    one = torch.cos(math.pi * (position + 0.5) * frequency / BLOCK) * math.sqrt(2 / BLOCK)
    one[0] = math.sqrt(1 / BLOCK)
    block = torch.einsum("yv,xh->yxhv", one, one).reshape(BLOCK**2, BLOCK**2)  # patchify: column before row
    luma = torch.tensor(LUMA)
    red, green, blue = torch.eye(3)
    colour = torch.stack([luma, BLUE * (blue - luma), RED * (red - luma)])
    kept = [y * BLOCK + x for y in range(BLOCK) for x in range(BLOCK) if y < BLOCK // 2 and x < BLOCK // 2]
    rows = [(0, index) for index in range(BLOCK**2)] + [(channel, index) for channel in (1, 2) for index in kept]
    inverse = torch.linalg.inv(colour)
    scale = torch.tensor(SCALES)
    encode = torch.stack([torch.outer(colour[channel], block[index]).flatten() for channel, index in rows])
    decode = torch.stack([torch.outer(inverse[:, channel], block[index]).flatten() for channel, index in rows], 1)
    return encode / scale[:, None], decode * scale


@torch.no_grad()
def start_as_block_transform(vae: AutoencoderKLWan) -> None:
    """Makes encoder and decoder the `cosine_transform`, in place."""
    for name, module in vae.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            module.weight[:, :, :-1] = 0
            module.weight[:, :, -1] *= 0 if last == "conv2" else 3.0  # keeps the variance, of the one frame that counts
            _bias(module).zero_()
            if last != "conv_in":
                module.weight[:, -ANCHORS:] = 0
            if last != "conv_out":
                _anchor(module, strength=0 if last == "conv2" else math.sqrt(module.out_channels / ANCHORS))
        elif isinstance(module, WanRMS_norm):
            module.gamma.fill_(1 if last == "norm_out" else GAIN)
            module.gamma[-ANCHORS:] = 0
        elif isinstance(module, WanAttentionBlock):
            module.proj.weight.zero_()
            _bias(module.proj).zero_()
    encode, decode = cosine_transform()
    _carry(vae.encoder.conv_in, encode)
    _read(vae.encoder.conv_out, torch.eye(LATENTS), outputs=LATENTS)
    _bias(vae.encoder.conv_out)[LATENTS:] = -8  # a narrow posterior
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(convolution.weight)
        _bias(convolution).zero_()
    _carry(vae.decoder.conv_in, torch.eye(LATENTS))
    _read(vae.decoder.conv_out, decode, outputs=len(decode))


def _anchor(convolution: WanCausalConv3d, strength: float) -> None:
    """The last channels become constants that training does not change; the norm of all channels is then about sqrt(channels)."""
    _hold(convolution.weight, slice(-ANCHORS, None), 0.0)
    _hold(_bias(convolution), slice(-ANCHORS, None), strength)


def _carry(convolution: WanCausalConv3d, matrix: torch.Tensor) -> None:
    """The first channels become +- the matrix' products; but for the anchors, what is left keeps its random weights."""
    count = len(matrix)
    convolution.weight[: 2 * count] = 0
    convolution.weight[:count, :, -1, 1, 1] = CARRIED * matrix
    convolution.weight[count : 2 * count, :, -1, 1, 1] = -CARRIED * matrix
    convolution.weight[2 * count :] *= 0.3


def _read(convolution: WanCausalConv3d, matrix: torch.Tensor, outputs: int) -> None:
    """The matrix' product with what `_carry` has put into the channels."""
    nn.init.zeros_(convolution.weight)
    count = matrix.shape[1]
    convolution.weight[:outputs, :count, -1, 1, 1] = matrix / CARRIED
    convolution.weight[:outputs, count : 2 * count, -1, 1, 1] = -matrix / CARRIED


@torch.no_grad()
def start_as_identity(transformer: WanTransformer3DModel) -> None:
    """v = 0, so z_H = z_L. Blocks start as plain ones (no shift, gates of 1) whose norms keep differences of contrast.

    A layer norm would bound v, but what an edge lacks grows with its contrast. So two channels of every token are anchors, too,
    `CONTRAST` times as large as tokens usually are. Behind the norms they are multiplied by zero, and all else by `CONTRAST`.
    """
    width = transformer.config["num_attention_heads"] * transformer.config["attention_head_dim"]
    transformer.proj_out.weight.zero_()
    _bias(transformer.proj_out).zero_()
    embedder = transformer.condition_embedder
    embedder.time_proj.weight.zero_()
    _bias(embedder.time_proj).zero_()
    strength = CONTRAST * float(transformer.patch_embedding.weight.flatten(1).norm(dim=1).mean()) * math.sqrt(width / 2)
    _hold(_bias(transformer.patch_embedding).zero_(), slice(-2, None), torch.tensor([strength, -strength]))
    _hold(transformer.patch_embedding.weight, slice(-2, None), 0.0)
    for parameter in (embedder.time_embedder.linear_2.weight, _bias(embedder.time_embedder.linear_2)):
        _hold(parameter, slice(-2, None), 0.0)
    for parameter in (embedder.time_proj.weight, _bias(embedder.time_proj)):
        _hold(parameter, [row * width - side for row in range(1, 7) for side in (1, 2)], 0.0)
    transformer.scale_shift_table.copy_(torch.tensor([0, CONTRAST - 1]).view(1, 2, 1).expand(1, 2, width))
    _hold(transformer.scale_shift_table, (0, slice(None), slice(-2, None)), torch.tensor([[0.0], [-1.0]]))
    for index, block in enumerate(blocks_of(transformer)):
        values = torch.tensor([0, CONTRAST - 1, 1, 0, CONTRAST - 1, 1])
        block.scale_shift_table.copy_(values.view(1, 6, 1).expand(1, 6, width))
        _hold(block.scale_shift_table, (0, slice(None), slice(-2, None)), torch.tensor([0.0, -1, 1, 0, -1, 1])[:, None])
        _hold(block.get_parameter("norm2.weight").fill_(CONTRAST), slice(-2, None), 0.0)
        _hold(block.get_parameter("norm2.bias"), slice(-2, None), 0.0)
        _look_at(block.attn1, OFFSETS[index % len(OFFSETS)])
        for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
            weight, bias = (block.get_parameter(f"{name}.{kind}") for kind in ("weight", "bias"))
            weight.mul_(1 / math.sqrt(len(transformer.blocks)))
            _hold(weight, slice(-2, None), 0.0)
            _hold(bias, slice(-2, None), 0.0)


def _hold(parameter: torch.Tensor, where: Any, value: float | torch.Tensor) -> None:
    """Sets a part of a parameter, which training then leaves as it is."""
    parameter[where] = value
    mask = torch.ones_like(parameter)
    mask[where] = 0
    parameter.register_hook(lambda gradient: gradient * mask.to(gradient.device))


def _look_at(attention: WanAttention, offsets: Sequence[tuple[int, int, int]]) -> None:
    """Makes every head attend mostly to the token at its offset (frame, row, column), whatever the tokens hold.

    As in ConViT (arXiv 2103.10697), attention starts as a soft convolution, or it would take thousands of steps to find out what
    a neighbour is. Rotary embeddings turn pairs of channels of queries and keys by their positions: where a constant query is
    turned ahead of a constant key by the angle of the offset, their product is largest there.
    """
    width = attention.inner_dim // attention.heads
    side = 2 * (width // 6)
    query, key = torch.zeros(2, attention.heads, width)
    for head, offset in enumerate(offsets[: attention.heads]):
        start = 0
        for length, distance in zip((width - 2 * side, side, side), offset, strict=True):
            for pair in range(min(SHARP_PAIRS, length // 2)):
                angle = distance * 10000.0 ** (-2 * pair / length)
                query[head, start + 2 * pair : start + 2 * pair + 2] = torch.tensor([math.cos(angle), math.sin(angle)])
                key[head, start + 2 * pair] = 1
            start += length
    for linear, bias in ((attention.to_q, query), (attention.to_k, key)):
        linear.weight *= 0.1
        _bias(linear).copy_(bias.flatten())
    for norm in (attention.norm_q, attention.norm_k):
        norm.weight.fill_(SHARPNESS)


def blocks_of(transformer: WanTransformer3DModel) -> list[WanTransformerBlock]:
    return [block for block in transformer.blocks if isinstance(block, WanTransformerBlock)]


def _bias(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("bias")
