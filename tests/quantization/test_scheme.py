"""Schemes, their JSON and what it refuses."""

from __future__ import annotations

import json

import pytest
from torch import nn

from qartsr_pipeline.quantization.diffusers_quantizer import QArtSRConfig
from qartsr_pipeline.quantization.scheme import Folding, LayerScheme, QuantizationScheme

SCHEME = QuantizationScheme(
    LayerScheme(4, 4, 8),
    {"z.*": LayerScheme(8, 8), "b.?": None, "*": LayerScheme(2, 2, 4), "a": LayerScheme(16, 16)},
    Folding(249, 77),
)


def through_json(scheme: QuantizationScheme) -> dict:
    """As diffusers writes it: keys sorted."""
    return json.loads(json.dumps(QArtSRConfig.from_scheme(scheme).to_dict(), sort_keys=True))


def test_json_round_trip_keeps_everything_and_the_order_of_overrides():
    config = QArtSRConfig.from_dict(through_json(SCHEME))
    assert config.scheme() == SCHEME and list(config.scheme().overrides) == list(SCHEME.overrides)
    assert through_json(QuantizationScheme())["quant_method"] == "qartsr"
    assert "format_version" in repr(config)


def test_the_first_matching_override_wins():
    assert SCHEME.for_layer("z.a") == LayerScheme(8, 8)
    assert SCHEME.for_layer("b.1") is None
    assert SCHEME.for_layer("b.12") == SCHEME.for_layer("a") == LayerScheme(2, 2, 4)
    turned = QuantizationScheme(SCHEME.default, dict(reversed(SCHEME.overrides.items())))
    assert turned.for_layer("a") is None  # 16 bits and no branch: nothing to do
    assert turned.for_layer("z.a") == LayerScheme(2, 2, 4)
    assert QuantizationScheme(LayerScheme(3, 3), {"B": None}).for_layer("b") == LayerScheme(3, 3)


def test_rank_is_clamped_to_the_layer():
    assert LayerScheme(rank=8).rank_for(nn.Linear(4, 32)) == 4
    assert LayerScheme(rank=8).rank_for(nn.Linear(32, 2)) == 2
    assert LayerScheme(rank=8).rank_for(nn.Conv2d(16, 1, 3)) == 8  # nine taps of one output
    assert LayerScheme(rank=8).rank_for(nn.Conv2d(16, 1, 1)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version 99.*versions 1 to 2.*pip install --upgrade"),
        ({"format_version": None}, "format_version None"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"colour": "blue"}, "unknown keys.*colour"),
        ({"default": {"weight_bits": 5, "activation_bits": 4, "rank": 0}}, "weight_bits is 5.*expected one of"),
        ({"default": {"weight_bits": 4, "activation_bits": 1, "rank": 0}}, "activation_bits is 1"),
        ({"default": {"weight_bits": 4, "activation_bits": 4, "rank": -1}}, "rank is -1"),
        ({"default": {"weight_bits": 4, "activation_bits": 4, "rank": 0, "group": 64}}, "group"),
        ({"default": None}, "cannot be read"),
        ({"folding": {"timestep": 999}}, "cannot be read.*tokens"),
        ({"folding": {"timestep": 999, "tokens": True}}, "tokens True"),
        ({"folding": {"timestep": -1, "tokens": 8}}, "timestep -1"),
        ({"folding": []}, "folding is .*not an object of exactly timestep, tokens"),
        ({"default": {"weight_bits": 4.0, "activation_bits": 4, "rank": 0}}, "weight_bits is 4.0"),
        ({"default": {"weight_bits": True, "activation_bits": 4, "rank": 0}}, "weight_bits is True"),
        ({"default": {"weight_bits": 4, "activation_bits": 4, "rank": True}}, "rank is True"),
        ({"default": {"weight_bits": 4, "activation_bits": 4}}, "default is .*exactly weight_bits, activation_bits, rank"),
        ({"overrides": {"a": None}}, "overrides holds"),
        ({"overrides": [["a"]]}, "overrides holds"),
        ({"overrides": [[7, None]]}, "overrides holds"),
        ({"overrides": [["a", None], ["a", None]]}, "a pattern that occurs once"),
        ({"overrides": [["a", 4]]}, "overrides, 'a' is 4, not an object"),
    ],
)
def test_what_cannot_be_read_is_said(change: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        QArtSRConfig.from_dict({**through_json(SCHEME), **change})
    assert "download the checkpoint again" in str(caught.value) or "Upgrade" in str(caught.value)


@pytest.mark.parametrize("key", ["format_version", "default"])
def test_nothing_essential_is_guessed(key: str):
    data = through_json(SCHEME)
    del data[key]
    with pytest.raises(ValueError, match=key):
        QArtSRConfig.from_dict(data)
