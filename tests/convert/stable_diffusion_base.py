"""A tiny model built like Stable Diffusion 2.1, and OSEDiff's checkpoint for it, made with peft the way OSEDiff makes its own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

UNET = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 12,
    "use_linear_projection": True,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
WORDS = ["!", "a", "b", "c", "!</w>", "a</w>", "b</w>", "c</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"]  # "!" pads
TEXT_ENCODER = {
    "vocab_size": len(WORDS),
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "hidden_act": "gelu",
    "projection_dim": 12,
    "bos_token_id": WORDS.index("<|startoftext|>"),
    "eos_token_id": WORDS.index("<|endoftext|>"),
}
SCHEDULER = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
RANK = 4


@dataclass
class Parts:
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDPMScheduler
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    tables: Path


def build_parts(folder: Path) -> Parts:
    """`folder` receives the tokenizer's tables, which a base has as they are."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    # Stable Diffusion 2.1's two files disagree on the padding; the second one is right.
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 7, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!", "unk_token": "<|endoftext|>"}))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    text_encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)).eval()
    scheduler = DDPMScheduler(**SCHEDULER, clip_sample=False)
    return Parts(UNet2DConditionModel(**UNET).eval(), AutoencoderKL(**VAE).eval(), scheduler, text_encoder, tokenizer, folder)


def save_base(parts: Parts, folder: Path) -> None:
    """A diffusers folder like that of Stable Diffusion 2.1-base."""
    for name in ("unet", "vae", "scheduler", "text_encoder"):
        getattr(parts, name).save_pretrained(folder / name)
    shutil.copytree(parts.tables, folder / "tokenizer")
    # The scheduler that Stable Diffusion's folder names is another one with the same noise schedule.
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text()) | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    path.write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (folder / "README.md").write_text("---\nlicense: openrail++\ntags:\n- text-to-image\n---\n# A base\n")


def adapt(parts: Parts) -> dict:
    """Puts OSEDiff's adapters on `parts`, with random weights, trains `conv_in` "by hand", and returns what it saves.

    Which layers are adapted: the UNet's convolutions, attention and feed-forward layers, but nothing of the time embedding; the
    VAE's encoder and quant_conv. Layers may be listed twice.
    """
    kinds = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    layers = [name for name, module in parts.unet.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    layers = [name for name in layers if any(kind in name for kind in kinds)]
    encoder = [name for name in layers if name.startswith(("down_blocks", "conv_in"))]
    decoder = [name for name in layers if name.startswith(("up_blocks", "conv_out"))]
    others = [name for name in layers if name not in encoder + decoder]
    vae_layers = [
        name
        for name, module in parts.vae.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and (name.startswith("encoder") or name == "quant_conv")
    ]
    vae_layers += ["quant_conv", vae_layers[0]]
    groups = {"default_encoder": encoder, "default_decoder": decoder, "default_others": others}
    for name, targets in groups.items():
        parts.unet.add_adapter(LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=targets), adapter_name=name)
    parts.unet.set_adapter(list(groups))
    parts.vae.add_adapter(
        LoraConfig(r=RANK, init_lora_weights="gaussian", target_modules=vae_layers), adapter_name="default_encoder"
    )
    with torch.no_grad():
        for model in (parts.unet, parts.vae):
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.normal_(std=0.1)
        parts.unet.conv_in.base_layer.weight.add_(0.05)
        parts.unet.conv_in.base_layer.bias.add_(0.05)
    return {
        "vae_lora_encoder_modules": vae_layers,
        "unet_lora_encoder_modules": encoder,
        "unet_lora_decoder_modules": decoder,
        "unet_lora_others_modules": others,
        "rank_unet": RANK,
        "rank_vae": RANK,
        "state_dict_unet": {key: value for key, value in parts.unet.state_dict().items() if "lora" in key or "conv_in" in key},
        "state_dict_vae": {key: value for key, value in parts.vae.state_dict().items() if "lora" in key},
    }


@torch.no_grad()
def adapted_forward(parts: Parts, x: torch.Tensor, prompt: str = "") -> torch.Tensor:
    """What OSEDiff's network does with (B, 3, H, W) in [-1, 1], taking the posterior's mode; its scheduler makes the step."""
    tokens = parts.tokenizer(prompt, max_length=7, padding="max_length", truncation=True, return_tensors="pt").input_ids
    embeds = parts.text_encoder(tokens)[0].expand(len(x), -1, -1)
    latents = parts.vae.encode(x).latent_dist.mode() * parts.vae.config.scaling_factor
    eps = parts.unet(latents, 999, encoder_hidden_states=embeds).sample
    parts.scheduler.set_timesteps(timesteps=[999])
    denoised = parts.scheduler.step(eps, torch.tensor(999), latents).prev_sample
    return parts.vae.decode(denoised / parts.vae.config.scaling_factor).sample.clamp(-1, 1)
