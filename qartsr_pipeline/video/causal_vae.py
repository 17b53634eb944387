"""WAN's autoencoder, streamed: frames go in, latents come out, and what its causal convolutions remember is kept in between.

`AutoencoderKLWan.encode` and `decode` take a whole clip and forget it afterwards. Here the same encoder and decoder are called
group by group with caches of one's own, so a clip of any length needs the memory of one group, and gives the same result as the
whole clip at once. Nothing is written into the module.
"""

from __future__ import annotations

import math

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, patchify, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from qartsr_pipeline.overflow import OverflowMemory, run_finite

Cache = list[torch.Tensor | str | None]


def temporal_factor(vae: AutoencoderKLWan) -> int:
    """Frames per latent, but for the first, which stands for one frame."""
    return 2 ** sum(map(bool, vae.config["temperal_downsample"]))


def spatial_factor(vae: AutoencoderKLWan) -> int:
    """Pixels per latent along height and width."""
    return 2 ** (len(vae.config["dim_mult"]) - 1) * (vae.config["patch_size"] or 1)


class IdleAttention(WanAttentionBlock):
    """An attention block that is left out while it adds nothing: its output projection is zero, as in our own small models.

    Over a whole frame attention would take longer than all convolutions together.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projection = self.proj
        # On meta, it is fetched for its own call alone (sequential offloading).
        if isinstance(projection, nn.Conv2d) and not projection.weight.is_meta and not projection.weight.any():
            if projection.bias is None or not projection.bias.any():
                return x
        return super().forward(x)


def skip_idle_attention(vae: AutoencoderKLWan) -> None:
    """Makes the attention blocks `IdleAttention`, in place; results and weights stay the same."""
    for module in vae.modules():
        if type(module) is WanAttentionBlock:
            module.__class__ = IdleAttention


class StreamedStage:
    """One half of the autoencoder with its caches.

    Args:
        name: "encode" or "decode", for messages.
        device: where it computes.
        overflows: see `overflow.run_finite`.
    """

    def __init__(self, name: str, vae: AutoencoderKLWan, device: torch.device, overflows: OverflowMemory) -> None:
        self.name, self.vae, self.device, self.overflows = name, vae, device, overflows
        part, stage = (vae.encoder, _encode) if name == "encode" else (vae.decoder, _decode)
        self._stage = apply_forward_hook(stage)  # offloading: as diffusers does it for `encode` and `decode`
        self._cache: Cache = [None] * sum(1 for _ in part.modules())  # at least one for each convolution
        self._begun = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The next group; raises FloatingPointError if the result is not finite in any dtype."""
        after: Cache = []

        def run(x: torch.Tensor) -> torch.Tensor:
            after[:] = [c.to(x) if isinstance(c, torch.Tensor) else c for c in self._cache]
            return self._stage(self.vae, x, after, not self._begun)

        result = run_finite(self.name, run, self.vae, x.to(self.device), self.overflows)
        self._cache, self._begun = after, True
        return result


def streamed_encoder(vae: AutoencoderKLWan, device: torch.device, overflows: OverflowMemory) -> StreamedStage:
    """Frames (1, 3, F, H, W) in [-1, 1] -> the posterior's mean of normalised latents (1, C, f, h, w).

    F is 1 in the first call and `temporal_factor` later; where that is 1, any number in any call.
    """
    return StreamedStage("encode", vae, device, overflows)


def streamed_decoder(vae: AutoencoderKLWan, device: torch.device, overflows: OverflowMemory) -> StreamedStage:
    """Normalised latents (1, C, f, h, w) -> frames (1, 3, F, H, W), about [-1, 1].

    f is 1 unless `temporal_factor` is 1. The first latent gives one frame, every other one `temporal_factor`.
    """
    return StreamedStage("decode", vae, device, overflows)


def _encode(vae: AutoencoderKLWan, x: torch.Tensor, cache: Cache, first: bool) -> torch.Tensor:
    if vae.config["patch_size"] is not None:
        x = patchify(x, vae.config["patch_size"])
    moments = vae.quant_conv(vae.encoder(x, feat_cache=cache, feat_idx=[0]))
    mean, deviation = _normalisation(vae, moments)
    return (moments.chunk(2, dim=1)[0] - mean) / deviation


def _decode(vae: AutoencoderKLWan, z: torch.Tensor, cache: Cache, first: bool) -> torch.Tensor:
    mean, deviation = _normalisation(vae, z)
    z = vae.post_quant_conv(z * deviation + mean)
    x = vae.decoder(z, feat_cache=cache, feat_idx=[0], first_chunk=first)
    return x if vae.config["patch_size"] is None else unpatchify(x, vae.config["patch_size"])


def _normalisation(vae: AutoencoderKLWan, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, (1, C, 1, 1, 1)."""
    mean, deviation = (torch.tensor(vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean.to(like), deviation.to(like)


def bytes_per_pixel(vae: AutoencoderKLWan, itemsize: int) -> int:
    """Rough peak of decoding a group of four frames, per pixel: the maps alive at the widest of the decoder's levels, and caches
    of two frames for each of its convolutions."""
    base, patch = vae.config["decoder_base_dim"] or vae.config["base_dim"], vae.config["patch_size"] or 1
    levels = vae.config["dim_mult"]
    widest = max(width * base / (patch * 2**level) ** 2 for level, width in enumerate(levels))
    convolutions = 2 * (len(levels) * (vae.config["num_res_blocks"] + 1) + 2)
    return math.ceil(itemsize * widest * (8 * 4 + 2 * convolutions))
