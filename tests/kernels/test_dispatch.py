"""The choice of a backend, and what it says when there is none."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qartsr_pipeline.kernels import BACKENDS, Constraints, LayerSpec, choose_backend, list_backends, use_backend

SPEC = LayerSpec("linear", 4, 4, 0, 8, 8)


def stub(name: str, unavailable: str | None = None, unsupported: str | None = None) -> SimpleNamespace:
    constraints = (Constraints(device="cpu"),)
    return SimpleNamespace(
        NAME=name, CONSTRAINTS=constraints, unavailable=lambda: unavailable, unsupported=lambda spec, device: unsupported
    )


@pytest.fixture
def fast_first(monkeypatch):
    """A table in which other backends stand before the reference."""
    reference = BACKENDS["reference"]
    monkeypatch.setattr("qartsr_pipeline.kernels.dispatch.BACKENDS", table := {})
    table["absent"] = stub("absent", unavailable="needs a library")
    table["picky"] = stub("picky", unsupported="8 bits only")
    table["reference"] = reference
    return table


def test_the_reference_runs_everywhere():
    assert list_backends()["reference"] is None
    for device in ("cpu", "cuda", "mps"):
        assert choose_backend(SPEC, device) in BACKENDS.values()
    with use_backend("reference"):
        assert choose_backend(SPEC, "cpu").NAME == "reference"


def test_the_first_that_can_is_chosen(fast_first, forget_choices):
    assert choose_backend(SPEC, "cpu").NAME == "reference"
    fast_first["picky"].unsupported = lambda spec, device: None if spec.weight_bits == 4 else "4 bits only"
    assert choose_backend(SPEC, "cpu").NAME == "reference"  # the choice for such a layer is made once
    forget_choices()
    assert choose_backend(SPEC, "cpu").NAME == "picky"


@pytest.mark.parametrize(("name", "reason"), [("absent", "needs a library"), ("picky", "8 bits only")])
def test_a_demanded_backend_that_cannot_says_why_and_is_not_replaced(fast_first, name: str, reason: str):
    assert list_backends()["absent"] == "needs a library"
    with use_backend(name), pytest.raises(RuntimeError, match=f"{name}: {reason}"):
        choose_backend(SPEC, "cpu")
    assert choose_backend(SPEC, "cpu").NAME == "reference"


def test_demands_nest_and_end_with_an_error(fast_first):
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("picky"):
            raise KeyError
        assert choose_backend(SPEC, "cpu").NAME == "reference"


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="no backend 'cuda12'.*reference"), use_backend("cuda12"):
        pass
