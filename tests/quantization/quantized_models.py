"""The tiny UNet and VAE, prepared and frozen with random quantization parameters."""

from __future__ import annotations

import torch
from random_layers import randomize
from torch import nn

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.quantization.calibrating import calibrating_layers, prepare
from qartsr_pipeline.quantization.deployed import DeployedLayer
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import Folding, LayerScheme, QuantizationScheme
from tiny_models import build_tiny_pipeline

# Several widths, layers without a branch, one that stays as it is; the broad patterns come last and sort first.
OVERRIDES = {
    "conv_out": None,
    "conv_in": LayerScheme(8, 8),
    "*.to_v": LayerScheme(2, 16, 1),
    "*.conv1": LayerScheme(3, 6, 1),
    "*": LayerScheme(4, 4, 2),
}


def unet_inputs(batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, int, torch.Tensor]:
    """Latent, timestep and prompt embedding for the tiny UNet."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 12, 16, generator=generator), 250, torch.randn(batch, 4, 16, generator=generator)


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run(model: nn.Module) -> torch.Tensor:
    """Output of either tiny model for its fixed input, in the model's dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    if "Autoencoder" in type(model).__name__:
        return model.decode(model.encode(picture().to(dtype)).latent_dist.mode()).sample
    latent, timestep, prompt = unet_inputs()
    return model(latent.to(dtype), timestep, prompt.to(dtype)).sample


def scheme_of(folding: Folding | None = None) -> QuantizationScheme:
    return QuantizationScheme(LayerScheme(6, 6), dict(OVERRIDES), folding)


def prepared(model: nn.Module, scheme: QuantizationScheme, seed: int = 0) -> nn.Module:
    """`prepare` with adapters, and random parameters that do not ruin the signal."""
    prepare(model, scheme, adapter_rank=1)
    generator = torch.Generator().manual_seed(seed)
    for layer in calibrating_layers(model).values():
        randomize(layer, generator, spread=0.05)
    return model


def quantized_pipeline() -> QArtSRPipeline:
    """UNet folded and quantized, VAE quantized."""
    pipeline = build_tiny_pipeline()
    folding = fold(pipeline.unet, pipeline.config.timestep, pipeline.prompt_embedding(1))
    for model, scheme in ((pipeline.unet, scheme_of(folding)), (pipeline.vae, scheme_of())):
        freeze(prepared(model, scheme), scheme)
    return pipeline


def deployed_layers(model: nn.Module) -> dict[str, DeployedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, DeployedLayer)}
