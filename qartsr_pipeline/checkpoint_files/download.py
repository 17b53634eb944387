"""Finds the local folder of a checkpoint that is given as a folder, a shipped model's name or a Hub id."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from qartsr_pipeline.checkpoint_files.checking import quantization_configs, read_model_index
from qartsr_pipeline.checkpoint_files.integrity import CheckpointError

# The model that commands and nodes use when none is named: most images that people enlarge are photographs that were compressed.
# On those, W4A4 is as good as W8A8 and full precision, and it is smaller (docs/benchmarks.md, "Photographs").
DEFAULT_CHECKPOINT = "photo-w4a4"
_SHIPPED = Path(__file__).resolve().parent.parent / "checkpoints"
# A repository on the Hub: owner/name, exactly one slash.
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
# The files of a checkpoint folder: configurations, weights, a tokenizer's tables, its card. No pickles, no code.
PATTERNS = ("*.json", "*.safetensors", "*.txt", "README.md")


def shipped_checkpoints() -> dict[str, Path]:
    """The checkpoints that came with this package, by name."""
    if not _SHIPPED.is_dir():
        return {}
    return {folder.name: folder for folder in sorted(_SHIPPED.iterdir()) if (folder / "model_index.json").is_file()}


def shipped_labels() -> dict[str, str]:
    """What each shipped checkpoint is for, by name, in a few words: "clean images, 4 bits, 4 MB".

    The purpose is what the header of its card says after ``purpose:``; bits and size are those of the folder.
    """
    return {name: label_of(folder) for name, folder in shipped_checkpoints().items()}


def label_of(folder: Path) -> str:
    """The label of one checkpoint folder, without a purpose where its card names none."""
    card = folder / "README.md"
    purpose = re.search(r"^purpose: (.+)$", card.read_text(encoding="utf-8"), re.M) if card.is_file() else None
    bits = sorted({config["default"]["weight_bits"] for config in quantization_configs(folder).values()})
    precision = f"{', '.join(map(str, bits))} bits" if bits else "full precision"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return ", ".join([*([purpose[1]] if purpose else []), precision, f"{size / 1e6:.0f} MB"])


def fetch(
    name_or_path: str | os.PathLike,
    *,
    cache_dir: str | os.PathLike | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    patterns: Sequence[str] = PATTERNS,
) -> Path:
    """The local folder of a checkpoint: an existing folder as it is, a shipped model by its name, or a snapshot from the Hub.

    Args:
        name_or_path: a path, the name of a shipped checkpoint such as `tiny-w4a4`, or a Hub id `owner/name`.
        cache_dir, revision, token, local_files_only: as in `huggingface_hub.snapshot_download`; used for Hub ids only.
        patterns: which files of a Hub repository are downloaded.

    Raises:
        CheckpointError: no such folder or name; Hub unreachable, repository unknown, private or gated.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = os.fspath(name_or_path)
    shipped = shipped_checkpoints()
    if name in shipped:
        return shipped[name]
    if not _is_hub_id(name):
        known = f" Shipped models: {', '.join(shipped)}." if shipped else ""
        raise CheckpointError(
            f"There is no folder {name!r}, and {_why_no_hub_id(name)}. Check the path and the folder you are in"
            f" ({Path.cwd()}).{known}"
        )
    return download(
        name,
        allow_patterns=list(patterns),
        cache_dir=cache_dir,
        revision=revision,
        token=token,
        local_files_only=local_files_only,
    )


def _is_hub_id(name: str) -> bool:
    """`owner/name`, unless `owner` is a folder here: then a mistyped path is far more likely than a repository."""
    return bool(_HUB_ID.match(name)) and not Path(name).parent.is_dir()


def _why_no_hub_id(name: str) -> str:
    if _HUB_ID.match(name):
        return f"it is not looked for on the Hub, because there is a folder {Path(name).parent.as_posix()!r} here"
    return "it is not a Hub id of the form owner/name either"


def download(hub_id: str, **options: Any) -> Path:
    """Downloads a Hub repository and returns its folder.

    Args:
        options: as in `huggingface_hub.snapshot_download`; `allow_patterns`, `revision` and `local_files_only` must be given.

    Raises:
        CheckpointError: Hub unreachable, repository unknown, private, gated or of another kind; the message says what to do.
    """
    try:
        if options["allow_patterns"] == list(PATTERNS):  # refuses another kind of repository before its weights are downloaded
            index = huggingface_hub.snapshot_download(hub_id, **{**options, "allow_patterns": ["model_index.json"]})
            read_model_index(Path(index))
        return Path(huggingface_hub.snapshot_download(hub_id, **options))
    except CheckpointError as error:
        raise CheckpointError(f"{hub_id} on the Hub is not a checkpoint of this package. {error}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{hub_id} on the Hub is gated: its owner grants access on request. Ask for access at"
            f" https://huggingface.co/{hub_id},"
            f" then log in with `hf auth login` or pass `token`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The Hub has no repository {hub_id!r} that you may see. Check the spelling; for a private one log in with"
            f" `hf auth login` or pass `token`; for a local folder give a path that exists."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{hub_id} has no revision {options['revision']!r}. Leave `revision` out for the newest."
        ) from error
    except Exception as error:
        # huggingface_hub also raises errors of its HTTP library, which differs from release to release.
        raise CheckpointError(_unreachable(hub_id, error, options["local_files_only"])) from error


def _unreachable(hub_id: str, error: Exception, local_files_only: bool) -> str:
    if local_files_only:
        return (
            f"{hub_id} is not in the local cache, and `local_files_only` forbids the download. Allow it once, or give a folder."
        )
    reason = " ".join(str(error).split())[:200]
    return (
        f"{hub_id} could not be downloaded from the Hub ({type(error).__name__}: {reason}). Check the network and"
        f" HF_HUB_OFFLINE, try again, or give a local folder."
    )
