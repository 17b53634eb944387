"""The small full-precision video model: which stock diffusers classes, how wide, and how it is initialised.

The autoencoder keeps every frame (no temporal downsampling) and a quarter of each side. It works at that quarter throughout:
``patch_size`` 4 makes 48 channels of 4 x 4 pixels, as sub-pixel networks do. Its initial weights are an exact linear transform:
the discrete cosine transform of each 4 x 4 block, of luma whole (16 coefficients) and of both chroma channels at half
resolution (4 each), which are the 24 latent channels. So training starts with an autoencoder that loses no luma, and the
transformer has to predict what a bicubic enlargement lacks: the high coefficients.

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
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, WanRMS_norm, patchify, unpatchify
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn

from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding

TIMESTEP = 400  # sigma 0.4; DOVE's is 399
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


def build_models(seed: int) -> tuple[AutoencoderKLWan, WanTransformer3DModel, torch.Tensor]:
    """Autoencoder, transformer and the fixed prompt embedding, (1, 8, 64), standard normal."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=64,
        decoder_base_dim=80,
        z_dim=LATENTS,
        dim_mult=[1],
        num_res_blocks=1,
        temperal_downsample=[],
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
        in_channels=3 * BLOCK**2,
        out_channels=3 * BLOCK**2,
        patch_size=BLOCK,
        scale_factor_temporal=1,
        scale_factor_spatial=BLOCK,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENTS,
        out_channels=LATENTS,
        text_dim=64,
        freq_dim=64,
        ffn_dim=768,
        num_layers=4,
    )
    start_as_block_transform(vae)
    start_as_identity(transformer)
    return vae, transformer, torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(seed))


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
    convolution.weight[-ANCHORS:] = 0
    _bias(convolution)[-ANCHORS:] = strength
    for parameter in (convolution.weight, _bias(convolution)):
        mask = torch.ones_like(parameter)
        mask[-ANCHORS:] = 0
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))


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
    """v = 0, so z_H = z_L; and every block starts as a plain one: no shift, no scale, gates of 1."""
    for layer in (transformer.proj_out, transformer.condition_embedder.time_proj):
        layer.weight.zero_()
        _bias(layer).zero_()
    transformer.scale_shift_table.zero_()
    _bias(transformer.patch_embedding).normal_(std=0.5)  # so that the norms keep differences of contrast
    for index, block in enumerate(_blocks(transformer)):
        block.scale_shift_table.zero_()
        block.scale_shift_table[:, 2] = 1
        block.scale_shift_table[:, 5] = 1
        _look_at(block.attn1, OFFSETS[index % len(OFFSETS)])
        for name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2"):
            block.get_parameter(f"{name}.weight").mul_(1 / math.sqrt(len(transformer.blocks)))


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


def _blocks(transformer: WanTransformer3DModel) -> list[WanTransformerBlock]:
    return [block for block in transformer.blocks if isinstance(block, WanTransformerBlock)]


def _bias(layer: nn.Module) -> torch.Tensor:
    return layer.get_parameter("bias")


class VideoModel(nn.Module):
    """The one-step video model as it is trained. Clips are (B, 3, F, H, W) in [-1, 1], latents (B, 24, F, H/4, W/4) of about
    unit variance.

    Attributes:
        latents_mean, latents_std: (24), of the autoencoder's own latents.
        sigma: sigma_T.
    """

    prompt_embeds: torch.Tensor
    latents_mean: torch.Tensor
    latents_std: torch.Tensor

    def __init__(
        self, vae: AutoencoderKLWan, transformer: WanTransformer3DModel, prompt_embeds: torch.Tensor, timestep: int = TIMESTEP
    ) -> None:
        super().__init__()
        self.vae, self.transformer, self.timestep = vae, transformer, timestep
        self.register_buffer("prompt_embeds", prompt_embeds)
        self.register_buffer("latents_mean", torch.zeros(vae.config["z_dim"]))
        self.register_buffer("latents_std", torch.ones(vae.config["z_dim"]))
        self.sigma = timestep / FlowMatchEulerDiscreteScheduler().config.num_train_timesteps
        for block in _blocks(transformer):
            for attention in (block.attn1, block.attn2):
                attention.set_processor(PlainAttention())  # type: ignore[arg-type] # any callable
        for module in vae.modules():
            if isinstance(module, WanCausalConv3d):
                module.forward = partial(_convolve, module)  # type: ignore[method-assign]
            elif isinstance(module, WanAttentionBlock):
                module.forward = _unchanged  # type: ignore[method-assign]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.latents_std.device

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        """Clip -> latents, every frame by itself."""
        x = patchify(_frames(clip), self.vae.config["patch_size"])
        mean = self.vae.quant_conv(self.vae.encoder(x)).chunk(2, dim=1)[0]
        return (_clip(mean, clip.shape[0]) - self._mean) / self._std

    def decode(self, latents: torch.Tensor, temporal: bool = True) -> torch.Tensor:
        """Latents -> clip; with ``temporal`` False the decoder's convolutions see one frame only, which costs a third."""
        z = latents * self._std + self._mean
        x = self.vae.decoder(self.vae.post_quant_conv(z if temporal else _frames(z)))
        clip = unpatchify(x, self.vae.config["patch_size"])
        return clip if temporal else _clip(clip, latents.shape[0])

    def step(self, latents: torch.Tensor) -> torch.Tensor:
        """z_H = z_L - sigma_T v."""
        count = latents.shape[0]
        timestep = torch.full((count,), self.timestep, device=latents.device)
        prompt = self.prompt_embeds.expand(count, -1, -1)
        v = self.transformer(latents, timestep, encoder_hidden_states=prompt, return_dict=False)[0]
        return latents - self.sigma * v

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Low-resolution clip enlarged to the final size -> high-resolution clip."""
        return self.decode(self.step(self.encode(clip)))

    def to_pipeline(self, dtype: torch.dtype, tile_size: int, frames_per_chunk: int) -> LSGQuantVideoPipeline:
        """A pipeline with copies of the weights in ``dtype``, on the CPU."""
        normalisation = {name: getattr(self, name).tolist() for name in ("latents_mean", "latents_std")}
        vae = AutoencoderKLWan.from_config(dict(self.vae.config) | normalisation)
        transformer = WanTransformer3DModel.from_config(self.transformer.config)
        for new, own in ((vae, self.vae), (transformer, self.transformer)):
            new.load_state_dict(own.state_dict())
            nn.Module.to(new.eval().requires_grad_(False), dtype)  # diffusers' own `to` warns about layers kept in float32
        return LSGQuantVideoPipeline(
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            prompt_embedding=PromptEmbedding.from_tensor(self.prompt_embeds.cpu().to(dtype)),
            timestep=self.timestep,
            scale=BLOCK,
            tile_size=tile_size,
            frames_per_chunk=frames_per_chunk,
        )

    @property
    def _mean(self) -> torch.Tensor:
        return self.latents_mean.view(1, -1, 1, 1, 1)

    @property
    def _std(self) -> torch.Tensor:
        return self.latents_std.view(1, -1, 1, 1, 1)


def new_model(seed: int, timestep: int = TIMESTEP) -> VideoModel:
    """A model with fresh weights, the same for the same seed."""
    return VideoModel(*build_models(seed), timestep)


class PlainAttention:
    """What diffusers' `WanAttnProcessor` computes, as three matrix operations: for short sequences on a CPU forward and backward
    take a third of the time that PyTorch's fused attention takes."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, tokens, width) -> (B, tokens, width); ``attention_mask`` is not used."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))  # (B, tokens, heads, d)
        if rotary_emb is not None:
            query, key = (_rotated(x, *rotary_emb).to(value.dtype) for x in (query, key))
        query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        result = (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](result))


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = cosine[..., 0::2], sine[..., 1::2]
    return torch.stack([first * cosine - second * sine, first * sine + second * cosine], -1).flatten(-2)


def _convolve(module: WanCausalConv3d, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
    """A lone frame needs the last temporal tap only: the rest would meet padding."""
    if cache_x is not None or x.shape[2] > 1:
        return WanCausalConv3d.forward(module, x, cache_x)
    padding = [int(module._padding[2]), int(module._padding[0])]
    return F.conv2d(x[:, :, 0], module.weight[:, :, -1], module.bias, padding=padding)[:, :, None]


def _unchanged(x: torch.Tensor) -> torch.Tensor:
    return x


def _frames(clip: torch.Tensor) -> torch.Tensor:
    """(B, C, F, H, W) -> (B * F, C, 1, H, W)."""
    return clip.transpose(1, 2).flatten(0, 1)[:, :, None]


def _clip(frames: torch.Tensor, count: int) -> torch.Tensor:
    """(B * F, C, 1, H, W) -> (B, C, F, H, W)."""
    return frames[:, :, 0].unflatten(0, (count, -1)).transpose(1, 2)
