"""Ranks under a budget: how errors are predicted to reach the picture, and who gets a branch."""

import numpy as np
import pytest
import torch
from recipes_for_tests import COMPONENTS, SmoothPatches, all_layers, calibrated, picture, small_recipe

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.data.pairs import degraded_pair
from qartsr_pipeline.calibration.image_family import image_of
from qartsr_pipeline.calibration.start.ranks import Sensitivity, choose, sensitivities
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.quantization.freeze import freeze
from tiny_models import build_tiny_pipeline

LAST, INNER = "vae.decoder.conv_out", "vae.decoder.mid_block.resnets.0.conv1"


def test_what_an_error_adds_to_the_picture_is_predicted():
    pipeline = build_tiny_pipeline()
    for component in COMPONENTS:
        getattr(pipeline, component).requires_grad_(False)
    layers = {name: getattr(pipeline, name[:3]).get_submodule(name[4:]) for name in (LAST, INNER)}
    up = degraded_pair(SmoothPatches().sample(2, 64, np.random.default_rng(0)))[0]
    reach = sensitivities(layers, lambda batch: image_of(pipeline, batch), [up] * 8)
    assert torch.equal(reach[LAST].weights, torch.full((3,), float(up[0, 0].numel())))  # an error there is the picture's
    assert reach[LAST].outputs == up[0, 0].numel()
    generator = torch.Generator().manual_seed(1)
    size = torch.linspace(0.5, 1.5, len(reach[INNER].weights)) * 1e-3
    with torch.no_grad():
        wanted, added = image_of(pipeline, up), []
        handle = layers[INNER].register_forward_hook(
            lambda _, inputs, out: out + torch.randn(out.shape, generator=generator) * size.view(-1, 1, 1)
        )
        for _ in range(20):
            added.append(float((image_of(pipeline, up) - wanted).square().sum() / len(up)))
        handle.remove()
    assert float((reach[INNER].weights * size.square()).sum()) == pytest.approx(np.mean(added), rel=0.2)


def test_costs_count_every_multiplication():
    reach = Sensitivity(torch.zeros(6), inputs=100, outputs=25)
    convolution = torch.nn.Conv2d(4, 6, 3, 2, 1)
    assert reach.multiplications(convolution) == 25 * 6 * 4 * 9
    assert reach.branch_multiplications(convolution) == 100 * 4 + 25 * 6 * 9
    assert reach.branch_multiplications(torch.nn.Linear(4, 6)) == 100 * 4 + 25 * 6


def test_the_steepest_decrease_is_bought_first_and_the_budget_kept():
    errors = {"cheap": {0: 10.0, 2: 9.9, 4: 1.0}, "dear": {0: 50.0, 2: 30.0, 4: 29.0}, "useless": {0: 1.0, 2: 1.0}}
    costs = {"cheap": 1, "dear": 10, "useless": 1}
    assert choose(errors, costs, 3) == {"cheap": 2, "dear": 0, "useless": 0}
    assert choose(errors, costs, 4) == {"cheap": 4, "dear": 0, "useless": 0}  # rank 2 alone buys next to nothing
    assert choose(errors, costs, 24) == {"cheap": 4, "dear": 2, "useless": 0}
    assert choose(errors, costs, 1000) == {"cheap": 4, "dear": 4, "useless": 0}


def test_a_budget_beats_one_rank_for_all_and_is_stored(tmp_path):
    wanted = picture(build_tiny_pipeline())[0]
    plain = picture(calibrated(small_recipe("steps=0", "layer.branch_rank=1"))[0])[0]
    pipeline, result = calibrated(small_recipe("steps=0", "layer.branch_rank=64", "layer.branch_budget=0.1"))
    assert psnr_y(picture(pipeline)[0], wanted) > psnr_y(plain, wanted)
    ranks = {name: layer.layer_scheme.rank_for(layer) for name, layer in all_layers(pipeline).items()}
    assert min(ranks.values()) == 0 and len(set(ranks.values())) > 2
    for component in COMPONENTS:
        freeze(getattr(pipeline, component), result.schemes[component])
    pipeline.save_pretrained(tmp_path / "model")
    loaded = QArtSRPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(picture(loaded), picture(pipeline))


def test_layers_on_other_grids_get_ranks_too():
    changes = ("images=2", "image_size=32", "layer.branch_rank=8", "layer.branch_budget=0.1", "layer.branch_rounds=1")
    pipeline, result = calibrated(small_recipe(*changes, name="svdquant"))
    assert torch.isfinite(picture(pipeline)).all()
    assert len({layer.layer_scheme.rank for layer in all_layers(pipeline).values()}) > 1
