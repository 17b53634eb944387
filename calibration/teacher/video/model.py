"""The small full-precision video model: which stock diffusers classes, how wide, and how it is initialised.

The autoencoder keeps every frame (no temporal downsampling) and a quarter of each side. It works at that quarter throughout:
``patch_size`` 4 makes 48 channels of 4 x 4 pixels, as sub-pixel networks do. Its initial weights are an exact linear transform:
the discrete cosine transform of each 4 x 4 block, of luma whole (16 coefficients) and of both chroma channels at half
resolution (4 each), which are the 24 latent channels. So training starts with an autoencoder that loses no luma, and the
transformer has to predict what a bicubic enlargement lacks: the high coefficients.

How the initial weights are made is in `start`.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanCausalConv3d, patchify, unpatchify
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from calibration.teacher.video.start import BLOCK, LATENTS, blocks_of, start_as_block_transform, start_as_identity
from qartsr_pipeline import LSGQuantVideoPipeline
from qartsr_pipeline.prompt_embedding import PromptEmbedding

TIMESTEP = 400  # sigma 0.4; DOVE's is 399


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
        for block in blocks_of(transformer):
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
