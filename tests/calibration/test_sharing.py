"""What large models do to save memory changes no number."""

from __future__ import annotations

import torch
from recipes_for_tests import SmoothPatches, context_of, picture, small_recipe

from qartsr_pipeline.calibration.instances import on_the_same_weights
from qartsr_pipeline.calibration.start import branches
from qartsr_pipeline.calibration.start.branches import leading_vectors
from qartsr_pipeline.calibration.training import blocks
from qartsr_pipeline.calibration.training.calibration_state import CalibrationContext
from qartsr_pipeline.calibration.training.engine import calibrate
from tiny_models import build_tiny_pipeline


def test_two_instances_on_the_same_weights_are_quantized_independently():
    pipeline = build_tiny_pipeline()
    full_precision = on_the_same_weights(pipeline)
    before = picture(full_precision)
    calibrate(CalibrationContext(pipeline, full_precision, small_recipe("steps=2"), (2, 2), SmoothPatches()))
    assert torch.equal(picture(full_precision), before) and not torch.equal(picture(pipeline), before)
    weights = [instance.vae.decoder.conv_out.weight.data_ptr() for instance in (pipeline, full_precision)]
    assert weights[0] == weights[1]


def test_blocks_that_run_again_in_the_backward_pass_train_the_same(monkeypatch):
    recipe, results, runs = small_recipe("steps=2"), [], []
    for large in (blocks.LARGE, 0):
        monkeypatch.setattr(blocks, "LARGE", large)
        context = context_of(recipe)
        block = context.pipeline.vae.decoder.mid_block.resnets[0]
        calls = []
        block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        results.append(calibrate(context))
        runs.append(sum(calls))
        assert "forward" not in block.__dict__
    assert results[0].losses == results[1].losses and results[0].layer_errors == results[1].layer_errors
    assert runs[1] > runs[0]


def test_leading_singular_vectors_of_large_matrices_leave_next_to_nothing_more(monkeypatch):
    monkeypatch.setattr(branches, "FULL_SVD", 500)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(900, 600, generator=generator) * torch.linspace(1, 0.1, 600)
    state = torch.random.get_rng_state()
    left = {}
    for limit, (u, s, vh) in {True: leading_vectors(matrix, 32), False: torch.linalg.svd(matrix)}.items():
        left[limit] = float((matrix - u[:, :32] * s[:32] @ vh[:32]).norm())
    assert left[False] < left[True] <= left[False] * 1.02  # by other means, and as good
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers change
