"""Every backend against the reference, on this machine's processor."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deployed_layers import random_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qartsr_pipeline.arithmetic.affine import BITS, centred_codes
from qartsr_pipeline.kernels import BACKENDS, low_memory, use_backend
from qartsr_pipeline.kernels.codes import BLOCK_ELEMENTS, DEVICE_BLOCK_ELEMENTS, Grid, block_rows, quantize
from qartsr_pipeline.kernels.cpu import prepare_branch
from qartsr_pipeline.quantization.scheme import LayerScheme

BIT_PAIRS = list(itertools.product(BITS, BITS))
FAST = [name for name in ("onednn", "int_mm", "float") if BACKENDS[name].unavailable() is None]
# what this processor's sums are wide enough for
COMPUTED = [
    (backend, bits)
    for backend, bits in itertools.product(FAST, BIT_PAIRS)
    if BACKENDS[backend].unsupported(random_layer(nn.Linear(24, 17), LayerScheme(*bits)).spec, "cpu") is None
]


def compute(backend: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with use_backend(backend), torch.no_grad():
        return layer(x)


def decibels(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Signal to noise ratio of y."""
    noise = (y.double() - expected.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise)) if noise else float("inf")


def assert_close(backend: str, layer: nn.Module, x: torch.Tensor) -> None:
    expected, y = compute("reference", layer, x), compute(backend, layer, x)
    assert y.shape == expected.shape and y.dtype == expected.dtype
    assert decibels(y, expected) >= (100 if x.dtype == torch.float32 else 40)


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("backend", "bits"), COMPUTED)
def test_every_pair_of_bits(backend: str, bits: tuple[int, int]):
    for rank, dtype in ((0, torch.float32), (3, torch.float32), (3, torch.bfloat16), (3, torch.float16)):
        scheme = LayerScheme(*bits, rank)
        assert_close(backend, random_layer(nn.Linear(24, 17), scheme), inputs(2, 9, 24, dtype=dtype))
        assert_close(backend, random_layer(nn.Conv2d(19, 16, 3, padding=1), scheme), inputs(2, 19, 6, 9, dtype=dtype))


@pytest.mark.parametrize(("backend", "bits"), COMPUTED)
def test_the_integers_are_the_same(backend: str, bits: tuple[int, int]):
    """With scales that are powers of two nothing is rounded after the product, so equal sums of integers are equal outputs."""
    for float_layer, shape in ((nn.Linear(24, 16, False), (50, 24)), (nn.Conv2d(8, 16, 3, 2, 1, bias=False), (2, 8, 7, 11))):
        layer = random_layer(float_layer, LayerScheme(*bits), seed=sum(bits), exact_scales=True)
        x = 3 * inputs(*shape)
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        expected = compute("reference", layer, x)
        assert torch.isfinite(expected).all() and expected.unique().numel() > 20
        assert torch.equal(compute(backend, layer, x), expected)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.data())
def test_every_geometry(data: st.DataObject):
    def pick(*choices):
        return data.draw(st.sampled_from(choices))

    scheme = LayerScheme(pick(2, 4, 8), pick(3, 4, 8), pick(0, 1, 8))
    geometry = {"stride": pick(1, 2, (2, 1)), "padding": pick(0, 1, 2, (0, 2)), "bias": pick(True, False)}
    layer = nn.Conv2d(pick(1, 3, 4, 9, 32), pick(1, 3, 8, 33), pick(1, 3, 5, (1, 3)), **geometry)
    deployed = random_layer(layer, scheme, seed := data.draw(st.integers(0, 1000)))
    x = inputs(pick(1, 3), layer.in_channels, data.draw(st.integers(5, 9)), data.draw(st.integers(5, 12)), seed=seed)
    x = pick(x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :, ::2, 1:].repeat(1, 1, 3, 1))
    for backend in FAST:
        if BACKENDS[backend].unsupported(deployed.spec, "cpu") is None:
            assert_close(backend, deployed, x)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_unusual_shapes(backend: str):
    linear = random_layer(nn.Linear(16, 8), LayerScheme(4, 4, 2))
    conv = random_layer(nn.Conv2d(16, 8, 3, 2, 1), LayerScheme(4, 4, 2))
    assert compute(backend, linear, inputs(0, 5, 16)).shape == (0, 5, 8)
    assert compute(backend, conv, inputs(0, 16, 6, 8)).shape == (0, 8, 3, 4)
    assert_close(backend, linear, inputs(16))
    assert_close(backend, linear, inputs(2, 3, 5, 16).transpose(0, 1))
    assert_close(backend, conv, inputs(16, 6, 8))
    assert_close(backend, conv, inputs(1, 16, 1, 1))
    with pytest.raises(RuntimeError):
        compute(backend, linear, inputs(3, 15))


@pytest.mark.parametrize("backend", FAST)
def test_large_feature_maps_are_computed_in_parts(backend: str, monkeypatch):
    monkeypatch.setattr("qartsr_pipeline.kernels.int_mm.PATCH_BYTES", 10_000)
    monkeypatch.setattr("qartsr_pipeline.kernels.codes.BLOCK_ELEMENTS", 30_000)
    x = inputs(2, 16, 65, 70)
    assert len(x[:, 0].flatten()) > 2 * block_rows(16)
    assert_close(backend, random_layer(nn.Conv2d(16, 8, 3, padding=1), LayerScheme(4, 4, 2)), x)
    assert_close(backend, random_layer(nn.Conv2d(16, 8, 3, padding=1), LayerScheme(6, 8)), x)


@pytest.mark.parametrize("bits", BITS)
def test_the_quantize_step_makes_the_integers_of_the_arithmetic(bits: int):
    """Also where the product is a tie, rounds to a tie, overflows, or is not a number."""
    halves = torch.arange(-600, 600, 0.5)
    special = torch.tensor([float("inf"), -float("inf"), 1e30, -1e30, 3e38, 1e-40, -0.0])
    columns = 3
    multiplier = torch.tensor([1.0, 1 / 3, 2.7])
    near = torch.nextafter(halves / multiplier[1], torch.tensor(float("inf")))
    x = torch.cat([halves, near, inputs(BLOCK_ELEMENTS) * 40, special])
    x = x[: len(x) // columns * columns].view(-1, columns)
    for zero_point in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        expected = centred_codes(x, multiplier, torch.tensor(float(zero_point)), bits).to(torch.int32)
        low, high = -zero_point, 2**bits - 1 - zero_point
        unsigned = Grid(multiplier, low, high, zero_point, torch.uint8)
        assert torch.equal(quantize(x, unsigned).to(torch.int32) - zero_point, expected)
        assert torch.equal(quantize(x, Grid(multiplier, low, high, 0, torch.float32)), expected.float())
        if bits < 8:
            signed = quantize(x, Grid(multiplier, low, high, 0, torch.uint8)).view(torch.int8)
            assert torch.equal(signed.to(torch.int32), expected)
        for dtype in (torch.bfloat16, torch.float16):
            small = x.to(dtype)
            expected_small = centred_codes(small, multiplier, torch.tensor(float(zero_point)), bits).to(torch.int32)
            assert torch.equal(quantize(small, unsigned).to(torch.int32) - zero_point, expected_small)
        assert (quantize(torch.full((1000, columns), float("nan")), unsigned) == zero_point).all()


def test_what_is_prepared_follows_the_layer_and_is_not_stored():
    layer = random_layer(nn.Conv2d(16, 8, 3, padding=1), LayerScheme(4, 4, 2))
    x, keys = inputs(1, 16, 5, 5), set(layer.state_dict())
    before = layer(x)
    assert layer.prepared.bytes >= 16 * 8 * 9 and set(layer.state_dict()) == keys
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu")):
        assert copied.prepared.bytes == 0 and torch.equal(copied(x), before)
    other = random_layer(nn.Conv2d(16, 8, 3, padding=1), LayerScheme(4, 4, 2), seed=1)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), before)
    layer.bias = torch.zeros_like(layer.bias)  # as offloading does, which puts other tensors into the place of these
    assert not torch.equal(layer(x), other(x))


@pytest.mark.parametrize("backend", FAST)
def test_low_memory_keeps_nothing_and_changes_nothing(backend: str, monkeypatch):
    layer = random_layer(nn.Conv2d(16, 8, 3, padding=1), LayerScheme(4, 4, 2))
    x = inputs(1, 16, 5, 5)
    with low_memory():
        saved = compute(backend, layer, x)
    assert layer.prepared.bytes == 0
    monkeypatch.setenv("QARTSR_LOW_MEMORY", "1")
    assert torch.equal(compute(backend, layer, x), saved) and layer.prepared.bytes == 0
    monkeypatch.setenv("QARTSR_LOW_MEMORY", "0")
    assert torch.equal(compute(backend, layer, x), saved) and layer.prepared.bytes > 0


@pytest.mark.parametrize(("bits", "share"), [((8, 8), 0), ((4, 4), 1)])
@pytest.mark.parametrize("backend", ["float", "int_mm"])
def test_no_float_copy_of_the_weights_is_kept(backend: str, bits: tuple[int, int], share: int):
    """A byte a weight at most, and none where the stored bytes are the codes."""
    for float_layer, shape in ((nn.Conv2d(64, 64, 3, padding=1), (1, 64, 5, 5)), (nn.Linear(256, 256), (2, 256))):
        layer = random_layer(float_layer, LayerScheme(*bits))
        getattr(BACKENDS[backend], layer.spec.kind)(inputs(*shape), layer)
        assert 0 <= layer.prepared.bytes - share * layer.weight_count < 4096


@pytest.mark.parametrize("bits", [(2, 8), (3, 3), (8, 4)])
def test_weights_that_stay_packed_give_the_same(bits: tuple[int, int], monkeypatch):
    """As on CUDA."""
    for float_layer, shape in ((nn.Conv2d(64, 8, 3, padding=1), (1, 64, 5, 5)), (nn.Linear(256, 8), (2, 256))):
        layer, x = random_layer(float_layer, LayerScheme(*bits, 2)), inputs(*shape)
        compute = getattr(BACKENDS["int_mm"], layer.spec.kind)
        unpacked = compute(x, layer)
        layer.prepared.clear()
        with monkeypatch.context() as patch:
            patch.setattr("qartsr_pipeline.kernels.int_mm.STAYS_PACKED_ON", {"cpu"})
            assert torch.equal(compute(x, layer), unpacked) and layer.prepared.bytes < 2048


def test_blocks_have_their_size_for_each_thread_and_are_larger_on_other_devices(monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert block_rows(64) * 64 == 3 * BLOCK_ELEMENTS and block_rows(64, "cuda") * 64 == DEVICE_BLOCK_ELEMENTS
    assert block_rows(0) > 0 and block_rows(10**9) == 1


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_branch_of_full_rank_is_one_product(kernel: int):
    """Where it takes fewer multiplications; in bfloat16 the factors' product is also rounded less often."""
    for rank, factors in ((4, True), (16, False)):
        layer = random_layer(nn.Conv2d(16, 16, kernel, padding=kernel // 2), LayerScheme(4, 4, rank))
        branch = prepare_branch(layer, torch.float32)
        assert branch is not None and (branch.down is not None) == factors
        assert branch.up.shape == (16, rank if factors else 16, kernel, kernel)


@pytest.mark.parametrize(("bits", "rank", "stride"), [((4, 4), 2, 1), ((4, 4), 0, 1), ((4, 4), 2, 2), ((8, 16), 0, 1)])
def test_nan_comes_out_of_layers_that_are_said_not_to_hide_it(bits: tuple[int, int], rank: int, stride: int):
    layer = random_layer(nn.Conv2d(8, 8, 1, stride), LayerScheme(*bits, rank))
    assert layer.spec.hides_what_is_not_finite == (bits == (4, 4) and (rank == 0 or stride == 2))
    for backend in (*FAST, "reference"):
        if layer.spec.hides_what_is_not_finite or BACKENDS[backend].unsupported(layer.spec, "cpu"):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for value in (torch.nan, torch.inf):
                x = inputs(1, 8, 6, 6, dtype=dtype)
                x[0, 3, 2, 1] = value
                assert not torch.isfinite(compute(backend, layer, x)).all()


@pytest.mark.skipif("onednn" not in FAST, reason="oneDNN's byte products are not available")
@pytest.mark.parametrize("sides", [(8, 8), (8, 9)])
def test_small_and_large_maps_have_a_layout_each(sides: tuple[int, int]):
    layer = random_layer(nn.Conv2d(96, 96, 3, padding=1), LayerScheme(4, 4))
    for x in (inputs(1, 96, *sides), inputs(1, 96, 20, 20)):
        assert_close("onednn", layer, x)


def test_gradients_come_from_the_reference():
    """A backend without a gradient is passed over, even when it is demanded."""
    layer, x = random_layer(nn.Linear(16, 8), LayerScheme(4, 4, 2)), inputs(3, 16)
    ours, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    for backend in FAST:
        with use_backend(backend):
            y = layer(ours)
        reference = BACKENDS["reference"].linear(expected, layer)
        assert torch.equal(y, reference)
        weights = inputs(3, 8, seed=1)
        gradients = [torch.autograd.grad((out * weights).sum(), source)[0] for out, source in ((y, ours), (reference, expected))]
        assert torch.equal(*gradients) and gradients[0].abs().min() > 0


def test_older_processors_refuse_what_would_saturate_and_compute_the_rest():
    """oneDNN can be set to use less than this processor has; the process must be a fresh one. Whether torch's own byte product
    goes through oneDNN differs between processors, so it is asked.
    """
    code = """
import test_backends as t
from qartsr_pipeline.kernels import int_mm
for name in t.FAST:
    specs = {b: t.random_layer(t.nn.Linear(8, 8), t.LayerScheme(*b)).spec for b in t.BIT_PAIRS}
    refused = [b for b, spec in specs.items() if t.BACKENDS[name].unsupported(spec, "cpu")]
    saturating = [] if int_mm.has_vnni() else [b for b in t.BIT_PAIRS if b[0] == 8]
    assert refused == {"onednn": [(8, 8)], "int_mm": saturating, "float": []}[name], refused
    for bits in t.BIT_PAIRS:
        if bits not in refused and max(bits) >= 6:
            t.test_extreme_codes_do_not_overflow(name, bits)
"""
    folder = Path(__file__).parent
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": f"{folder}{os.pathsep}{folder.parents[1]}"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, check=True)


@pytest.mark.parametrize("bits", [(8, 8), (6, 8), (8, 6), (4, 4)])
@pytest.mark.parametrize("backend", FAST)
def test_extreme_codes_do_not_overflow(backend: str, bits: tuple[int, int]):
    """All codes are the largest: sums of two neighbouring products are as large as they can be."""
    for float_layer, shape in ((nn.Linear(64, 16), (20, 64)), (nn.Conv2d(16, 16, 3), (1, 16, 8, 8))):
        layer = random_layer(float_layer, LayerScheme(*bits), exact_scales=True)
        if BACKENDS[backend].unsupported(layer.spec, "cpu"):
            continue
        layer.weight_packed.fill_(127 if bits[0] == 8 else 255)
        layer.input_zero_point.fill_(0)
        if bits[0] < 8:
            layer.weight_zero_point.fill_(0)
        x = torch.full(shape, 1e6)
        assert torch.equal(compute(backend, layer, x), compute("reference", layer, x))


@pytest.mark.parametrize("machine", ["x86_64", "arm64"])
def test_a_product_that_would_be_slow_is_refused(machine: str, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    assert BACKENDS["int_mm"].unavailable() is None
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: False)
    reason = BACKENDS["int_mm"].unavailable() or ""
    assert ("no VNNI, without which this product is slower" in reason) == (machine == "x86_64")
