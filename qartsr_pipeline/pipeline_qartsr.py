"""QArtSRPipeline: images in, enlarged images out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput

from qartsr_pipeline.calls import Calls, TileReporter, Turn, access_to, alone_where_needed
from qartsr_pipeline.checkpoint_files.checking import PIPELINE_CLASS
from qartsr_pipeline.checkpoint_pipeline import CheckpointPipeline
from qartsr_pipeline.image import tiles
from qartsr_pipeline.image.conversion import ImageTensors, from_images, stack_if_equal, to_images
from qartsr_pipeline.image.resize import enlarged_size
from qartsr_pipeline.image.tiles import Tile, TileGrid, TilePlan
from qartsr_pipeline.input_checks import CallArguments, check_components
from qartsr_pipeline.memory import Enlargement, check_memory
from qartsr_pipeline.one_step import OneStepNetwork, Settings, run_network, upscale_image
from qartsr_pipeline.overflow import OverflowMemory, compute_dtype
from qartsr_pipeline.prompt_embedding import PromptEmbedding, check_prompt, embed_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Called as callback(pipeline, step, timestep, tensors), with the tensors that it asks for.
StepCallback = Callable[["QArtSRPipeline", int, int, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


@dataclass
class QArtSRPipelineOutput(BaseOutput):
    """Output of `QArtSRPipeline`.

    Args:
        images: the enlarged images, in the form that `output_type` asks for; see `QArtSRPipeline.__call__`.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor | list


class QArtSRPipeline(CheckpointPipeline):
    """Image super-resolution with one step of a diffusion model, full precision or quantized.

    Args:
        unet: predicts the noise at the one timestep.
        vae: its encoder and decoder.
        scheduler: only its `alphas_cumprod` is used; `prediction_type` must be "epsilon".
        prompt_embedding: the fixed prompt.
        text_encoder, tokenizer: optional; with them the call takes a prompt.
        timestep: T, the one timestep the model was trained at.
        scale: the enlargement it was trained at.

    Attributes:
        share_tile_statistics: tiles use the group normalization statistics of the whole image, estimated beforehand on a
            sample of it. False leaves every tile its own, which shows as differences in tone; it saves one pass per image.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"  # type: ignore[assignment]
    _optional_components = ["text_encoder", "tokenizer"]
    share_tile_statistics = True
    _callback_tensor_inputs = ["image", "latents"]
    checkpoint_class = PIPELINE_CLASS

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        scheduler: DDPMScheduler,
        prompt_embedding: PromptEmbedding,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        timestep: int = 999,
        scale: int = 4,
    ):
        super().__init__()
        check_components(unet, vae, scheduler, prompt_embedding, timestep, scale)
        components = {"unet": unet, "vae": vae, "scheduler": scheduler, "prompt_embedding": prompt_embedding}
        self.register_modules(**components, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(timestep=timestep, scale=scale)
        self._calls = Calls()
        self._overflows = OverflowMemory()

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of the enlarged image per latent element, along each axis."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def multiple(self) -> int:
        """The enlarged image is padded so that its sides are multiples of this: the network's total down-sampling."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def num_timesteps(self) -> int:
        """How many steps (tiles) this thread's current or last call has; in other threads, that of the call that began last."""
        return self._calls.current().steps

    @property
    def current_tile(self) -> tuple[Tile, TileGrid] | None:
        """The last tile that was finished, and the grid over the padded image, in pixels at the model's scale. None before a
        call's first tile. For `callback_on_step_end`, to show what is finished. Of the same call as `num_timesteps`."""
        return self._calls.current().tile

    @property
    def interrupt(self) -> bool:
        """Whether the call is to end early: `pipeline._interrupt = True`, as in diffusers, leaves out its remaining tiles.

        Set in a callback it means that call, in a thread without a call all that are running. The result is the bicubic
        enlargement where nothing was computed. To get no result, raise an exception in the callback.
        """
        return self._calls.current().interrupted

    @property
    def _interrupt(self) -> bool:
        return self.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupted: bool) -> None:
        self._calls.interrupt(bool(interrupted))

    def check_inputs(self, **arguments: Any) -> CallArguments:
        """The arguments of `__call__` except images and prompt, as plain Python values; raises TypeError or ValueError that names
        the one that is wrong.
        """
        return CallArguments(**arguments).checked(self.multiple, self._callback_tensor_inputs)

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        upscale: float = 4,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        color_fix: str | None = "wavelet",
        generator: torch.Generator | None = None,
        sample_posterior: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["image"],  # noqa: B006 - diffusers' signature
        prompt: str | None = None,
        keep_hidden_colors: bool = False,
        fidelity: float = 0.0,
    ) -> QArtSRPipelineOutput | tuple:
        """Enlarges images.

        The network works at its own scale on the bicubic enlargement of the image. The result gets the input's colours and, if
        `upscale` is another factor, is resampled to exactly round(height * upscale) x round(width * upscale).

        Args:
            image: a PIL image of any mode but "F"; a numpy array (H, W), (H, W, C) or (B, H, W, C), or a torch tensor (H, W),
                (C, H, W) or (B, C, H, W), of uint8, uint16 or float in [0, 1]; or a list of these, which may differ in kind and
                size. C: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA. Any size from 1 x 1.
            upscale: enlargement, above 0 and up to 16.
            tile_size: longest side of a tile in pixels of the enlarged image (at the model's scale), rounded down to a multiple
                of `multiple`. None: the whole image at once if it is small, else tiles as large as memory allows.
            tile_overlap: how far neighbouring tiles overlap at least, in the same pixels, rounded up. None: 4 x `multiple`,
                but not more than a quarter of the tile.
            color_fix: "wavelet" or "adain": aligns colours to the enlarged input. None: the network's own colours.
            generator: source of the noise for `sample_posterior`.
            sample_posterior: draw from the encoder's posterior instead of taking its mode. The noise of the whole image is
                drawn at once, so that it does not depend on the tiles.
            output_type: "pil": list of PIL images (greyscale and alpha kept, 16-bit greyscale as "I;16"). "np": float32 array
                (B, H, W, C) in [0, 1]. "pt": float32 CPU tensor (B, C, H, W) in [0, 1]. "latent": float32 CPU tensor, z_H of the
                padded image (B, C, h, w), neither decoded nor resampled. The last three are lists of arrays without the axis B
                when sizes or channels differ.
            return_dict: False for a plain tuple.
            callback_on_step_end: called after every tile as callback(pipeline, step, timestep, callback_kwargs); what it returns
                under "image", or "latents" where these are the result, replaces the tile. To cancel, raise an exception.
            callback_on_step_end_tensor_inputs: what callback_kwargs holds: "image", the tile in [0, 1], (1, 3, h, w); "latents",
                its z_H.
            prompt: what the images show, for checkpoints that hold text encoder and tokenizer; cut off after 77 tokens. None:
                the stored embedding.
            keep_hidden_colors: enlarge colours under alpha 0 as they are, for textures whose alpha is gloss or a mask. False:
                they become those of their visible neighbours, so that they do not bleed into them.
            fidelity: share of the bicubic enlargement in the result, 0 to 1: less invented detail, and softer. Not for latents.

        Returns:
            `QArtSRPipelineOutput`, or a tuple with `images` as its only element.

        Raises:
            TypeError, ValueError: an argument is not as described, or this checkpoint takes no prompt; the message names it.
            NotEnoughMemory: a MemoryError, before anything is computed: the images do not fit into main memory.
            FloatingPointError: the network's result is not finite, not even in float32.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        arguments = self.check_inputs(
            upscale=upscale,
            tile_size=tile_size,
            tile_overlap=tile_overlap,
            color_fix=color_fix,
            generator=generator,
            sample_posterior=sample_posterior,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            keep_hidden_colors=keep_hidden_colors,
            fidelity=fidelity,
        )
        check_prompt(prompt, self.unet, self.text_encoder, self.tokenizer)
        with alone_where_needed(part for part in self.components.values() if isinstance(part, torch.nn.Module)) as turn:
            try:
                inputs = to_images(image, keep_hidden_colors=arguments.keep_hidden_colors)
                images = self._enlarged(inputs, arguments, prompt, turn)
            finally:
                if turn.held:  # else another call has the pipeline, and does it at its own end
                    self.maybe_free_model_hooks()
        return QArtSRPipelineOutput(images=images) if return_dict else (images,)

    def _enlarged(
        self, inputs: list[ImageTensors], arguments: CallArguments, prompt: str | None, turn: Turn
    ) -> list[PIL.Image.Image] | np.ndarray | torch.Tensor | list:
        plans = [self.plan(one, arguments.tile_size, arguments.tile_overlap) for one in inputs]
        check_memory([self._enlargement(one, plan, arguments) for one, plan in zip(inputs, plans, strict=True)])
        with self._calls.begin(sum(len(plan.grid) for plan in plans)) as call, self.progress_bar(total=call.steps) as bar:
            on_tile = TileReporter(self, call, bar, arguments, turn)
            settings = Settings(
                self.config["scale"],
                arguments.upscale,
                arguments.color_fix,
                arguments.output_type != "latent",
                arguments.sample_posterior,
                arguments.generator,
                self.share_tile_statistics,
                lambda: call.interrupted,
                arguments.fidelity,
            )
            network = self.network(prompt)
            each = zip(inputs, plans, strict=True)
            if settings.decode:
                results = [upscale_image(network, one, plan, settings, on_tile) for one, plan in each]
            else:
                latents = [run_network(network, one, plan, settings, on_tile)[1][0] for one, plan in each]
            if on_tile.step < call.steps:
                logger.warning(
                    "The call was interrupted after %d of %d tiles. What is left is the bicubic enlargement, or 0 in latents.",
                    *(on_tile.step, call.steps),
                )
        return from_images(results, arguments.output_type) if settings.decode else stack_if_equal(latents)

    def plan(self, image: ImageTensors, tile_size: int | None, tile_overlap: int | None) -> TilePlan:
        """The tiles in which `image` is enlarged; arguments as in `__call__`."""
        size = enlarged_size((image.height, image.width), self.config["scale"])

        def automatic(padded: tuple[int, int]) -> int | None:
            free = tiles.free_memory(self._execution_device)
            if self._execution_device.type == "cpu":  # what the images take is not the network's
                free -= Enlargement((image.height, image.width), size, size).bytes()
            return tiles.choose_tile_size(padded, self._pixel_bytes(), free)

        return tiles.plan_tiles(size, tile_size, tile_overlap, self.multiple, self.vae_scale_factor, automatic)

    def _pixel_bytes(self) -> int:
        with access_to(self.vae).together():  # it may be in a wider dtype at the moment
            return tiles.bytes_per_pixel(self.vae, compute_dtype(self.vae).itemsize)

    def _enlargement(self, image: ImageTensors, plan: TilePlan, arguments: CallArguments) -> Enlargement:
        size, tile = (image.height, image.width), plan.grid.tile_height * plan.grid.tile_width
        on_cpu = self._execution_device.type == "cpu"
        return Enlargement(
            size,
            enlarged_size(size, self.config["scale"]),
            enlarged_size(size, arguments.upscale),
            image.alpha is not None,
            arguments.output_type != "latent",
            int(tiles.SURE_SHARE * tile * self._pixel_bytes()) if on_cpu else 0,
        )

    def network(self, prompt: str | None = None) -> OneStepNetwork:
        """The stages on tensors (encode, step, decode), for engineers who build on them; `prompt` as in `__call__`."""
        return OneStepNetwork(
            unet=self.unet,
            vae=self.vae,
            prompt_embeds=self._prompt_embeds(prompt),
            timestep=self.config["timestep"],
            alpha_bar=float(self.scheduler.alphas_cumprod[self.config["timestep"]]),
            device=self._execution_device,
            overflows=self._overflows,
        )

    def _prompt_embeds(self, prompt: str | None) -> torch.Tensor:
        """(1, tokens, dim): the stored embedding, or that of `prompt`."""
        if prompt is None:
            return self.prompt_embedding(1)
        check_prompt(prompt, self.unet, self.text_encoder, self.tokenizer)
        return embed_prompt(self.text_encoder, self.tokenizer, prompt, self._execution_device)
