"""Whether the components of a video pipeline fit together."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLWan, SchedulerMixin, WanTransformer3DModel

from qartsr_pipeline.prompt_embedding import PromptEmbedding
from qartsr_pipeline.quantization.diffusers_quantizer import attached_scheme


def check_video_components(
    transformer: WanTransformer3DModel | None,
    vae: AutoencoderKLWan | None,
    scheduler: SchedulerMixin | None,
    prompt_embedding: PromptEmbedding | None,
    timestep: int,
    scale: int,
) -> None:
    """Checks that the components fit together. Those that are None (a pipeline taken apart on purpose) are left out.

    Raises:
        ValueError: they do not fit.
    """
    if not isinstance(scale, int) or scale < 1:
        raise ValueError(f"`scale` must be an integer from 1, but is {scale!r}.")
    if scheduler is not None:
        config: Any = scheduler.config  # type: ignore[attr-defined] # schedulers are configurable, too
        flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
        if not flow:
            raise ValueError(
                f"`scheduler` is a {type(scheduler).__name__} of prediction_type {config.get('prediction_type')!r}; one step of"
                " WAN needs a flow-matching one such as FlowMatchEulerDiscreteScheduler."
            )
        count = config["num_train_timesteps"]
        if not isinstance(timestep, int) or not 0 < timestep < count:
            raise ValueError(f"`timestep` must be an integer from 1 to {count - 1}, as `scheduler` has it, but is {timestep!r}.")
    if transformer is None:
        return
    config = transformer.config
    if config["patch_size"][0] != 1:
        raise ValueError(f"`transformer` has patch_size {tuple(config['patch_size'])}; its patches must be of one frame.")
    if config["image_dim"] is not None or config["added_kv_proj_dim"] is not None:
        raise ValueError("`transformer` is of an image-to-video model; one-step super-resolution needs a text-to-video one.")
    if vae is not None and not vae.config["z_dim"] == config["in_channels"] == config["out_channels"]:
        raise ValueError(
            f"`transformer` takes {config['in_channels']} latent channels and gives {config['out_channels']}, but `vae` has"
            f" {vae.config['z_dim']}: they are of different models."
        )
    if prompt_embedding is not None and prompt_embedding.config["dim"] != config["text_dim"]:
        raise ValueError(
            f"`prompt_embedding` has tokens of width {prompt_embedding.config['dim']}, but `transformer` has text_dim"
            f" {config['text_dim']}: they are of different models."
        )
    scheme = attached_scheme(transformer)
    if scheme is not None and scheme.folding is not None and scheme.folding.timestep != timestep:
        raise ValueError(
            f"`timestep` is {timestep}, but the constants of timestep {scheme.folding.timestep} are folded into `transformer`, so"
            f" frames would be wrong. Give timestep={scheme.folding.timestep}, or a transformer quantized at timestep {timestep}."
        )
