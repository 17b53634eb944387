"""Reads pickles of tensors without running any code in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from qartsr_pipeline.checkpoint_files import CheckpointError

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
    with open(path, "rb") as file:
        if not file.read(2).startswith(_FIRST_BYTES):
            raise CheckpointError(f"{path} is not a checkpoint that PyTorch wrote, or it is damaged. Download it again.")
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


def read_prompt_embedding(path: str | os.PathLike[str]) -> torch.Tensor:
    """A prompt's embedding, float32 (1, tokens, dim), from a safetensors file with one tensor or a pickled tensor (.pt).

    Raises:
        CheckpointError: as `read_pickle`, or when the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}. Give the prompt's embedding as .safetensors or .pt.")
    if path.suffix == ".safetensors":
        try:
            tensors = list(load_file(path).values())
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}). Download it again.") from error
        found = tensors[0] if len(tensors) == 1 else tensors
    else:
        found = read_pickle(path)
    if not isinstance(found, torch.Tensor) or not found.is_floating_point() or found.ndim not in (2, 3):
        raise CheckpointError(f"{path} holds no prompt embedding: that is one tensor (1, tokens, dim) of floating-point numbers.")
    if found.ndim == 3 and found.shape[0] != 1:
        raise CheckpointError(f"{path} holds the embeddings of {found.shape[0]} prompts. Give one prompt's.")
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{path} holds NaN or infinity. Download it again.")
    return found.detach().float().view(1, *found.shape[-2:])
