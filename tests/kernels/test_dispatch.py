"""The choice of a backend, and what is said about it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from qartsr_pipeline import list_backends, use_backend
from qartsr_pipeline.kernels import BACKENDS, Backend, Constraints, LayerSpec, choose_backend
from qartsr_pipeline.kernels.cpu import OneDNN

SPEC = LayerSpec("linear", 4, 4, 0, 8, 8)


class Stub(Backend):
    """A backend that refuses what a test says."""

    name = "stub"
    constraints = (Constraints(device="cpu"),)

    def __init__(self, name: str, unavailable: str | None = None, unsupported: str | None = None):
        self.name, self.reason, self.refusal = name, unavailable, unsupported

    def unavailable(self) -> str | None:
        return self.reason

    def unsupported(self, spec: LayerSpec, device: str) -> str | None:
        return self.refusal

    def linear(self, x, layer):
        raise NotImplementedError

    conv2d = linear


@pytest.fixture
def table(monkeypatch) -> dict[str, Backend]:
    """A table in which other backends stand before the reference."""
    backends = (Stub("absent", unavailable="needs a library"), Stub("picky", unsupported="8 bits only"), BACKENDS["reference"])
    table = {backend.name: backend for backend in backends}
    monkeypatch.setattr("qartsr_pipeline.kernels.dispatch.BACKENDS", table)
    return table


@pytest.fixture
def without_vnni(monkeypatch) -> None:
    """An x86 processor whose sums of byte products saturate."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    monkeypatch.setattr(OneDNN, "constraints", tuple(replace(one, has_vnni=lambda: False) for one in OneDNN.constraints))


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_the_reference_computes_every_layer_on_every_device(device: str):
    assert list_backends()["reference"] is None
    for spec in (SPEC, LayerSpec("conv2d", 16, 16, 4, 3, 5, (3, 3), (2, 2), (1, 1))):
        assert BACKENDS["reference"].unsupported(spec, device) is None
        with use_backend("reference"):
            assert choose_backend(spec, device) is BACKENDS["reference"]


def test_a_device_without_a_backend_of_its_own_gets_the_reference():
    assert choose_backend(SPEC, "mps") is BACKENDS["reference"]


def test_the_first_that_can_is_chosen(table, forget_choices):
    assert choose_backend(SPEC, "cpu").name == "reference"
    table["picky"].refusal = None
    assert choose_backend(SPEC, "cpu").name == "reference"  # the choice for such a layer is made once
    forget_choices()
    assert choose_backend(SPEC, "cpu").name == "picky"


def test_triton_is_listed_but_only_used_when_asked_for(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" in list_backends()
    monkeypatch.setattr(BACKENDS["triton"].__class__, "unavailable", lambda self: None)
    assert choose_backend(SPEC, "cpu").name != "triton"
    with use_backend("triton"):
        assert choose_backend(SPEC, "cpu").name == "triton"


@pytest.mark.parametrize(("name", "reason"), [("absent", "needs a library"), ("picky", "8 bits only")])
def test_a_demanded_backend_that_cannot_says_why_and_is_not_replaced(table, name: str, reason: str):
    assert list_backends()["absent"] == "needs a library"
    with use_backend(name), pytest.raises(RuntimeError, match=f"{name}: {reason}"):
        choose_backend(SPEC, "cpu")
    assert choose_backend(SPEC, "cpu").name == "reference"


def test_demands_nest_and_end_with_an_error(table):
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("picky"):
            raise KeyError
        assert choose_backend(SPEC, "cpu").name == "reference"


def test_the_environment_variable_demands_too(table, monkeypatch):
    monkeypatch.setenv("QARTSR_BACKEND", "picky")
    with pytest.raises(RuntimeError, match="picky: 8 bits only"):
        choose_backend(SPEC, "cpu")
    with use_backend("reference"):
        assert choose_backend(SPEC, "cpu").name == "reference"


def test_an_unknown_name_lists_the_known(monkeypatch):
    with pytest.raises(ValueError, match="no backend 'cuda12'.*reference"), use_backend("cuda12"):
        pass
    monkeypatch.setenv("QARTSR_BACKEND", "cuda12")
    with pytest.raises(ValueError, match="no backend 'cuda12'.*reference"):
        choose_backend(SPEC, "cpu")


@pytest.mark.skipif(not hasattr(torch.ops.onednn, "qlinear_prepack"), reason="this build of torch has no oneDNN")
def test_eight_bits_without_vnni_are_announced_once_for_each_kind_of_layer(without_vnni, caplog):
    caplog.set_level(logging.WARNING)
    assert choose_backend(SPEC, "cpu").name == "onednn" and not caplog.messages
    for channels in (8, 16):
        assert choose_backend(LayerSpec("linear", 8, 8, 0, channels, 8), "cpu").name == "float"
    (linear,) = caplog.messages
    for part in ("Linear layers at W8A8", "'float'", "on cpu", "onednn: W8A8 needs a processor with VNNI"):
        assert part in linear
    choose_backend(LayerSpec("conv2d", 8, 8, 0, 8, 8, (3, 3)), "cpu")
    assert len(caplog.messages) == 2 and "Convolutions at W8A8" in caplog.messages[1]


def test_a_fallback_to_the_reference_is_announced(table, caplog):
    choose_backend(SPEC, "cpu")
    (message,) = caplog.messages
    assert "'reference'" in message and "picky: 8 bits only" in message
    assert "absent" not in message  # a backend that this machine does not have is no loss


def test_a_choice_that_was_demanded_is_not_announced(table, caplog):
    with use_backend("reference"):
        choose_backend(SPEC, "cpu")
    assert not caplog.messages
