"""What our pipelines have in common: loading a folder that was checked, and saving one whole or not at all."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline

from qartsr_pipeline.checkpoint_files import fetch, saving, structure
from qartsr_pipeline.offloading import MovablePipeline
from qartsr_pipeline.stored_values import check_finite, naming_the_file

if TYPE_CHECKING:
    from typing_extensions import Self  # a part of the standard library from Python 3.11 on

HUB_ARGUMENTS = ("cache_dir", "local_files_only", "token", "revision")


class CheckpointPipeline(MovablePipeline):
    """A pipeline of checkpoint folders.

    Attributes:
        checkpoint_class: the class that its folders name; `checkpoint_files.checking.PIPELINES` says what is in them.
    """

    checkpoint_class: str

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Loads a checkpoint folder or a repository of the Hugging Face Hub, after checking that it is complete and undamaged.

        Args:
            pretrained_model_name_or_path: the folder, or "owner/name".
            kwargs: as for `DiffusionPipeline.from_pretrained` (`dtype`, `revision`, `cache_dir`, components, ..).

        Raises:
            CheckpointError: not a checkpoint, damaged or unavailable; the message says which.
        """
        hub_arguments = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        folder = fetch(pretrained_model_name_or_path, **hub_arguments)
        structure.check_loadable(folder, kwargs, cls.checkpoint_class)
        with structure.clear_errors(folder, kwargs), naming_the_file(folder):
            pipeline = super().from_pretrained(str(folder), **kwargs)
            for name, part in pipeline.components.items():
                if name not in kwargs and isinstance(part, torch.nn.Module):
                    check_finite(part)
        return pipeline

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        """Saves the pipeline as a diffusers folder with checksums: whole or not at all.

        Args:
            save_directory: created if missing; an earlier checkpoint in it is replaced, other files stay.
            kwargs: as for `DiffusionPipeline.save_pretrained`; with `push_to_hub=True` the whole folder is uploaded.

        Raises:
            OSError: it cannot be written, or holds weights of another variant; what was there is unchanged.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("`safe_serialization` must be True: checkpoints are stored as safetensors only.")
        upload_arguments = saving.take_upload_arguments(kwargs)
        save, variant = partial(super().save_pretrained, **kwargs), kwargs.get("variant")
        saving.save_whole(save, Path(save_directory), variant, self.checkpoint_class)
        if upload_arguments is not None:
            saving.upload(self, Path(save_directory), **upload_arguments)

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> dict | tuple:  # type: ignore[override]
        """As in diffusers, but pipeline.py in the folder, meant for the generic `DiffusionPipeline`, is not executed."""
        loaded = super().load_config(*args, **kwargs)
        if isinstance(loaded, tuple):
            return (saving.without_entry_point(loaded[0]), *loaded[1:])
        return saving.without_entry_point(loaded)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As in diffusers, sharing the components; but their dtype stays unless another one is asked for."""
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = pipeline.dtype
        return super().from_pipe(pipeline, **kwargs)
