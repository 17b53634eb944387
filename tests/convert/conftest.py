"""The tiny base and its checkpoint, made once; tests change copies."""

import copy
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from stable_diffusion_base import adapt, build_parts, save_base  # noqa: E402


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """`base`: the folder; `plain`: its parts; `adapted`: parts with OSEDiff's adapters; `content`: what OSEDiff saves of them."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    plain = build_parts(folder / "tables")
    save_base(plain, folder / "base")
    adapted = copy.deepcopy(plain)
    return types.SimpleNamespace(base=folder / "base", plain=plain, adapted=adapted, content=adapt(adapted))


@pytest.fixture
def base(made, tmp_path):
    """A copy of the base's folder."""
    return Path(shutil.copytree(made.base, tmp_path / "base"))


@pytest.fixture
def content(made):
    """A copy of the checkpoint's content; its tensors are shared."""
    return {key: copy.copy(value) for key, value in made.content.items()}


@pytest.fixture
def checkpoint(made, tmp_path):
    path = tmp_path / "osediff.pkl"
    torch.save(made.content, path)
    return path


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing in here may open a connection."""
    import socket

    def refuse(*arguments, **options):
        raise AssertionError("a test of conversion tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
