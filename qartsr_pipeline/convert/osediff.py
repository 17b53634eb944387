"""OSEDiff's checkpoint (arXiv 2406.08177; github.com/cswry/OSEDiff): adapters on the UNet and VAE of Stable Diffusion 2.1-base.

It is a pickled dictionary of the rank, the names of the adapted layers, and the tensors in peft's layout. PassionSR
(github.com/libozhu03/PassionSR) publishes one of the same kind, osediff.ckpt, in which two entries have other names, the VAE's
decoder has adapters too, which PassionSR's own code does not use, and any weight of the base may stand beside the adapters.
"""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qartsr_pipeline.checkpoint_files import CheckpointError
from qartsr_pipeline.checkpoint_files.integrity import check_readable
from qartsr_pipeline.checkpoint_files.weight_files import check_safetensors
from qartsr_pipeline.convert.adapters import Adapters, Merged, merge
from qartsr_pipeline.convert.diffusers_folder import Base

TIMESTEP = 999  # OSEDiff's UNet always gets the last of 1000 timesteps
SCALE = 4
UNET_LAYERS = {
    "default_encoder": "unet_lora_encoder_modules",
    "default_decoder": "unet_lora_decoder_modules",
    "default_others": "unet_lora_others_modules",
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
VAE_LAYERS = {"default_encoder": "vae_lora_encoder_modules"}


@dataclass(frozen=True)
class Layout:
    """The names of entries in a published checkpoint.

    Attributes:
        unet, vae: entries that hold the tensors.
        unet_replaced, vae_replaced: as `Adapters.replaced`.
        left_out: VAE adapters in the file that the authors' own code does not use.
    """

    unet: str
    vae: str
    unet_replaced: tuple[str, ...] | None
    vae_replaced: tuple[str, ...] | None
    left_out: tuple[str, ...] = ()


OSEDIFF = Layout("state_dict_unet", "state_dict_vae", ("conv_in",), ())
PASSIONSR = Layout("unet_state_dict", "vae_state_dict", None, None, left_out=("default_decoder",))


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint."""

    unet: Adapters
    vae: Adapters

    def merge_into(self, base: Base) -> dict[str, Merged]:
        """Makes `base` the adapted model, in place; raises CheckpointError when they do not fit."""
        return {"unet": merge(base.unet, self.unet), "vae": merge(base.vae, self.vae)}


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens osediff.pkl, or PassionSR's osediff.ckpt, without running any code in it.

    Raises:
        CheckpointError: not such a file; the message names what is missing or of the wrong kind.
    """
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not OSEDiff's checkpoint: it holds a {type(content).__name__}, not a dictionary.")
    layout = PASSIONSR if PASSIONSR.unet in content or PASSIONSR.vae in content else OSEDIFF
    reader = _Reader(Path(path), content)
    reader.check_entries(["rank_unet", "rank_vae", layout.unet, layout.vae, *UNET_LAYERS.values(), *VAE_LAYERS.values()])
    vae_state = reader.tensors(layout.vae)
    vae_state = {key: tensor for key, tensor in vae_state.items() if not any(f".{name}." in key for name in layout.left_out)}
    return Checkpoint(
        unet=Adapters(
            label=f"{path}: {layout.unet}",
            rank=reader.rank("rank_unet"),
            layers={adapter: reader.names(entry) for adapter, entry in UNET_LAYERS.items()},
            state=reader.tensors(layout.unet),
            replaced=layout.unet_replaced,
        ),
        vae=Adapters(
            label=f"{path}: {layout.vae}",
            rank=reader.rank("rank_vae"),
            layers={adapter: reader.names(entry) for adapter, entry in VAE_LAYERS.items()},
            state=vae_state,
            replaced=layout.vae_replaced,
        ),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads entries of the dictionary and checks their types."""

    path: Path
    content: dict[str, Any]

    def check_entries(self, entries: list[str]) -> None:
        missing = [entry for entry in entries if entry not in self.content]
        if missing:
            found = ", ".join(map(str, list(self.content)[:8])) or "nothing"
            raise CheckpointError(
                f"{self.path} is not OSEDiff's checkpoint, or not a complete one: it lacks {', '.join(missing)} (it has {found})."
                f" Give the osediff.pkl that its authors published."
            )

    def rank(self, entry: str) -> int:
        value = self.content[entry]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self.path}: {entry} must be a positive integer, but is {value!r}.")
        return value

    def names(self, entry: str) -> tuple[str, ...]:
        """Layer names, each once: OSEDiff's code lists some of them several times."""
        value = self.content[entry]
        if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
            raise CheckpointError(f"{self.path}: {entry} must be a list of layer names, but is a {type(value).__name__}.")
        return tuple(dict.fromkeys(value))

    def tensors(self, entry: str) -> dict[str, torch.Tensor]:
        value = self.content[entry]
        if not isinstance(value, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in value.values()):
            raise CheckpointError(f"{self.path}: {entry} must be a dictionary of tensors, but is not.")
        for key, tensor in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{self.path}: the keys of {entry} must be names of tensors, but one is {key!r}.")
            if tensor.dtype not in FLOATS or tensor.layout is not torch.strided or tensor.is_meta:
                kind = f"{'meta ' * tensor.is_meta}{tensor.layout}, {tensor.dtype}".replace("torch.", "")
                raise CheckpointError(f"{self.path}: {key} in {entry} is not a plain tensor of 16, 32 or 64 bit floats ({kind}).")
        return value


_EMBEDDING = "that is one tensor (1, tokens, dim) of floating-point numbers. Give the file that the model's authors published"
_LARGEST_EMBEDDING = 100_000_000  # numbers
_FIRST_BYTES = (b"PK", b"\x80")  # a zip archive, or a pickle by itself


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Reads a file that `torch.save` wrote, if it holds only tensors, numbers, strings and plain containers; tensors on the CPU.

    Raises:
        CheckpointError: no such file, not a pickle, damaged, or a pickle with anything else in it, which could run code. No code
            in it is run.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Give the checkpoint's file, such as osediff.pkl.")
    check_readable(path, str(path))
    with open(path, "rb") as file:
        first = file.read(2)
    if not first.startswith(_FIRST_BYTES):
        raise CheckpointError(f"{path} is not a checkpoint that PyTorch wrote, or it is damaged. Download it again.")
    if first == b"PK":
        _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors, numbers, strings, lists and dictionaries, so opening it could run"
            f" code. Nothing of it was run. Take the file as the model's authors published it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {reason}): it is truncated or damaged. Download it again."
        ) from error


def _check_archive(path: Path) -> None:
    """Compares the entries of a zip archive with their CRC-32 sums, which `torch.load` does not do."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:
                raise CheckpointError(
                    f"{path} is compressed (its {path.stat().st_size:,} bytes would become {unpacked:,}), which PyTorch never"
                    " does, so it was not read. Take the file as the model's authors published it."
                )
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is truncated or damaged ({' '.join(str(error).split())[:120]}). Download it again."
        ) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: {damaged[:120]!r} in it does not have its CRC-32 sum, so weights would be wrong. Download it"
            f" again."
        )


def read_prompt_embedding(source: str | os.PathLike[str] | torch.Tensor) -> torch.Tensor:
    """A prompt's embedding, float32 (1, tokens, dim).

    Args:
        source: a safetensors file with one tensor, a pickled tensor (.pt), or the embedding; (1, tokens, dim) or (tokens, dim).

    Raises:
        CheckpointError: as `read_pickle`, or when it is something else.
    """
    if isinstance(source, torch.Tensor):
        return _checked_embedding(source, "The given tensor")
    path = Path(source)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Give the prompt's embedding as .safetensors or .pt.")
    if path.suffix == ".safetensors":
        stored = check_safetensors(path, str(path))
        if len(stored) != 1 or sum(prod(tensor.shape) for tensor in stored.values()) > _LARGEST_EMBEDDING:
            raise CheckpointError(f"{path} holds no prompt embedding: {_EMBEDDING}.")
        return _checked_embedding(next(iter(load_file(path).values())), str(path))
    return _checked_embedding(read_pickle(path), str(path))


def _checked_embedding(found: object, name: str) -> torch.Tensor:
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.ndim not in (2, 3):
        raise CheckpointError(f"{name} holds no prompt embedding: {_EMBEDDING}.")
    if found.ndim == 3 and found.shape[0] != 1:
        raise CheckpointError(f"{name} holds the embeddings of {found.shape[0]} prompts. Give one prompt's.")
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{name} holds NaN or infinity. Download or compute it again.")
    return found.detach().float().view(1, *found.shape[-2:])
