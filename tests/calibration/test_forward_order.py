"""Rounding once more behind quantized layers: in running order, and only where inputs are coarse."""

from __future__ import annotations

import pytest
import torch
from recipes_for_tests import calibrated, small_recipe
from torch import nn

from qartsr_pipeline.calibration.start.forward_order import patches_with_outputs, round_in_forward_order
from qartsr_pipeline.calibration.start.initialise import Initialisation, initialise
from qartsr_pipeline.calibration.start.observers import observe
from qartsr_pipeline.calibration.training.progress import Callbacks
from qartsr_pipeline.quantization.calibrating import CalibratingConv2d
from qartsr_pipeline.quantization.scheme import LayerScheme


def maps(count: int) -> torch.Tensor:
    return nn.functional.interpolate(torch.randn(count, 3, 8, 8), (32, 32), mode="bilinear")


def network() -> tuple[nn.Sequential, nn.Sequential, dict[str, CalibratingConv2d]]:
    """Four convolutions in full precision, and the same at 2 bits, set up."""
    torch.manual_seed(0)
    widths = (3, 12, 12, 12, 3)
    plain = [nn.Conv2d(*pair, 3, padding=1) for pair in zip(widths, widths[1:], strict=False)]
    full = nn.Sequential(*[part for layer in plain for part in (layer, nn.SiLU())][:-1])
    names = [str(2 * index) for index in range(4)]
    samples = observe(dict(zip(names, plain, strict=True)), full, [maps(8) for _ in range(4)], windows=True)
    layers = {
        name: CalibratingConv2d.from_layer(layer, LayerScheme(2, 2), adapter_rank=27)
        for name, layer in zip(names, plain, strict=True)
    }
    initialise(layers, samples, Initialisation(smoothing=(0.5,), rounding="patches"))
    quantized = nn.Sequential(*[part for layer in layers.values() for part in (layer, nn.SiLU())][:-1])
    return full, quantized, layers


def test_the_networks_output_comes_closer_on_inputs_that_were_not_seen():
    full, quantized, layers = network()
    weights = {name: layer.weight.clone() for name, layer in layers.items()}
    unseen = maps(16)
    with torch.no_grad():
        wanted = full(unseen)
        before = (quantized(unseen) - wanted).square().mean()
    reports: list[tuple[str, int, int]] = []
    progress = Callbacks(on_preparation=lambda *report: reports.append(report))
    changed = round_in_forward_order(layers, quantized, maps(16), progress)
    with torch.no_grad():
        assert (quantized(unseen) - wanted).square().mean() < 0.95 * before
    assert changed == sorted(changed) and len(changed) >= 2
    assert [report[1:] for report in reports] == [(done, 4) for done in range(5)]
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers.items())


def test_layers_are_as_before_when_it_is_interrupted():
    _, quantized, layers = network()

    def interrupt(_: str, done: int, __: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        round_in_forward_order(layers, quantized, maps(4), Callbacks(on_preparation=interrupt))
    assert all(layer.quantizing and "forward" not in vars(layer) for layer in layers.values())


@pytest.mark.parametrize("size", [32, 6])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (4, 3)])
def test_windows_and_outputs_are_of_the_same_places(kernel, stride, padding, size):
    layer = nn.Conv2d(3, 5, kernel, stride, padding)
    x = torch.randn(2, 3, size, size + 1)
    windows, outputs = patches_with_outputs(layer, x, layer(x), torch.Generator().manual_seed(0))
    assert torch.allclose(nn.functional.conv2d(windows, layer.weight, layer.bias, stride), outputs, atol=1e-5)


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(3, 5, 1), (2, 3, 9, 7)), (nn.Linear(7, 5), (2, 9, 7))])
def test_positions_and_outputs_are_of_the_same_places(layer, shape):
    x = torch.randn(shape)
    rows, outputs = patches_with_outputs(layer, x, layer(x), torch.Generator().manual_seed(0))
    if isinstance(layer, nn.Conv2d):
        assert torch.allclose(rows @ layer.weight.flatten(1).T + layer.bias, outputs, atol=1e-5)
    else:
        assert torch.allclose(layer(rows), outputs, atol=1e-5)


def test_a_map_below_the_kernel_gives_nothing():
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 2, 2)
    assert patches_with_outputs(layer, x, layer(x), torch.Generator()) is None


@pytest.mark.parametrize(
    ("bits", "rounding", "runs"), [((2, 2), "patches", True), ((4, 4), "patches", False), ((2, 2), "nearest", False)]
)
def test_a_recipe_asks_for_it_and_coarse_inputs_get_it(bits, rounding, runs):
    reports: list[str] = []
    progress = Callbacks(on_preparation=lambda what, *_: reports.append(what))
    changes = ("steps=0", f"layer.rounding={rounding}", "layer.adapter_rank=32", "layer.rounding_inputs=quantized")
    _, result = calibrated(small_recipe(*changes), bits, progress=progress)
    assert ("round behind quantized layers" in reports) is runs
    assert all(error < 10 for error in result.errors_before.values())
