"""What differs between the releases of diffusers and transformers that this package works with.

Environments are shared: another package may keep transformers, and with it huggingface-hub and diffusers, at an older release.
Only a text encoder needs transformers, so nothing imports it before there is one.

| release | what changed |
| :-- | :-- |
| diffusers 0.36 | pipelines have `enable_group_offload`; before, only models had it |
| diffusers 0.37 | annotations of a pipeline's components may be text, as they are after `from __future__ import annotations` |
| diffusers 0.40 | `from_pretrained` and `from_pipe` take `dtype`; before, `torch_dtype`, which is deprecated now |
| transformers 4.56 | the same |
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from types import ModuleType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

from qartsr_pipeline.checkpoint_files.integrity import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self  # a part of the standard library from Python 3.11 on

DTYPE_SINCE = {"diffusers": (0, 40), "transformers": (4, 56)}  # `dtype` instead of `torch_dtype`


def release(package: str) -> tuple[int, ...]:
    """The numbers of an installed package's version: (0, 35, 2)."""
    return tuple(int(number) for number in re.match(r"[\d.]*\d", importlib.metadata.version(package))[0].split("."))  # type: ignore[index]


def dtype_argument(kind: type, dtype: torch.dtype | dict | None) -> dict[str, Any]:
    """The dtype as the argument that `kind.from_pretrained` takes, by the name that its library has for it.

    Args:
        kind: a class of diffusers, of transformers, or derived from one of theirs.
    """
    package = "transformers" if any(base.__module__.startswith("transformers.") for base in kind.__mro__) else "diffusers"
    return {"dtype" if release(package) >= DTYPE_SINCE[package] else "torch_dtype": dtype}


def import_transformers(part: str, other_way: str) -> ModuleType:
    """The package transformers, for a part that cannot be read without it.

    Args:
        part: what it is, for the error: "text_encoder in FOLDER".
        other_way: how to do without, a sentence for the error.

    Raises:
        CheckpointError: it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError(
            f"{part} is read by the package transformers, which is not installed: pip install 'qartsr[prompt]'. {other_way}"
        )
    import transformers

    return transformers


class PortablePipeline(DiffusionPipeline):
    """A pipeline of diffusers with the interface of its newest release."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in diffusers; takes `dtype` and `torch_dtype` on every release."""
        return super().from_pretrained(*args, **_with_own_dtype(cls, kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """As in diffusers; takes `dtype` and `torch_dtype` on every release."""
        return super().from_pipe(pipeline, **_with_own_dtype(cls, kwargs))

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple]:
        """The types that diffusers expects of the components. Any text encoder is one, so that transformers is not imported."""
        of_transformers = {name: object for name in ("PreTrainedModel", "PreTrainedTokenizerBase")}
        hints = get_type_hints(cls.__init__, localns=of_transformers)
        return {name: get_args(hint) or (hint,) for name, hint in hints.items() if name != "return"}

    def enable_group_offload(
        self, onload_device: torch.device, *args: Any, offload_type: str = "block_level", **kwargs: Any
    ) -> None:
        """As in diffusers, with `offload_type` by name."""
        if release("diffusers") >= (0, 36):
            super().enable_group_offload(onload_device, *args, offload_type=offload_type, **kwargs)  # type: ignore[misc]
            return
        excluded = kwargs.pop("exclude_modules", None) or []
        excluded = [excluded] if isinstance(excluded, str) else excluded
        for name, part in self.components.items():
            if isinstance(part, torch.nn.Module) and name in excluded:
                part.to(onload_device)
            elif isinstance(part, torch.nn.Module):
                apply_group_offloading(part, torch.device(onload_device), *args, offload_type=offload_type, **kwargs)  # type: ignore[misc]


def _with_own_dtype(kind: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
    given = [kwargs[name] for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None]
    return others | (dtype_argument(kind, given[0]) if given else {})
