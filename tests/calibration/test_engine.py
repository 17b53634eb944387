"""Quantization of a whole tiny pipeline as recipes say: what training changes, in which order, and that it can be stopped."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from recipes_for_tests import COMPONENTS, SmoothPatches, all_layers, calibrated, context_of, picture, small_recipe

from qartsr_pipeline import QArtSRPipeline
from qartsr_pipeline.calibration.families import family_of
from qartsr_pipeline.calibration.image_family import image_of
from qartsr_pipeline.calibration.recipe import RecipeError
from qartsr_pipeline.calibration.training import stages, steps
from qartsr_pipeline.calibration.training.blocks import distributed, turns
from qartsr_pipeline.calibration.training.engine import begin
from qartsr_pipeline.calibration.training.losses import EncoderFeatures
from qartsr_pipeline.calibration.training.progress import Callbacks
from qartsr_pipeline.calibration.training.stages import TensorStore, record
from qartsr_pipeline.calibration.training.steps import StagePlan, keep_zero_inside
from qartsr_pipeline.image.metrics import psnr_y
from qartsr_pipeline.quantization.calibrating import prepare
from qartsr_pipeline.quantization.fold import fold
from qartsr_pipeline.quantization.freeze import freeze
from qartsr_pipeline.quantization.scheme import LayerScheme, QuantizationScheme
from tiny_models import build_tiny_pipeline


def prepared(pipeline=None):
    """A pipeline with calibrating layers, nothing set."""
    pipeline = pipeline or build_tiny_pipeline()
    for component in COMPONENTS:
        prepare(getattr(pipeline, component), QuantizationScheme(LayerScheme(4, 4)))
    return pipeline


@pytest.mark.parametrize(
    ("bounds", "fit"), [("percentile", "false"), pytest.param("mse", "false", marks=pytest.mark.slow), ("mse", "true")]
)
def test_eight_bits_keep_the_picture_and_fewer_bits_lose_more(bounds, fit):
    wanted = picture(build_tiny_pipeline())
    recipe = small_recipe("steps=0", f"layer.bounds={bounds}", f"layer.branch_fit={fit}")
    eight, four = (picture(calibrated(recipe, bits)[0]) for bits in ((8, 8), (4, 4)))
    assert psnr_y(eight[0], wanted[0]) > 32  # random weights amplify errors more than trained ones
    assert psnr_y(eight[0], wanted[0]) > psnr_y(four[0], wanted[0]) + 3


@pytest.mark.slow
def test_training_comes_closer_and_leaves_the_original_weights_alone():
    full_precision = build_tiny_pipeline()
    fold(full_precision.unet, full_precision.config.timestep, full_precision.prompt_embedding(1))
    pipeline, result = calibrated(
        small_recipe("steps=50", *(f"stages.{i}.{key}" for i in (0, 1) for key in ("share=0.5", "lr=0.01"))), (3, 4)
    )
    assert family_of(pipeline).digest(pipeline) == family_of(pipeline).digest(full_precision) == result.weights
    assert len(result.losses["RPQ"]) == len(result.losses["ET"]) == 25
    untrained = calibrated(small_recipe("steps=0"), (3, 4))[0]
    wanted = picture(build_tiny_pipeline())[0]
    assert psnr_y(picture(pipeline)[0], wanted) > psnr_y(picture(untrained)[0], wanted) + 1


def test_what_is_simulated_is_what_is_deployed(tmp_path):
    pipeline, result = calibrated(small_recipe("steps=4"), (4, 4))
    seen = {}
    for name, layer in all_layers(pipeline).items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    picture(pipeline)
    for component in COMPONENTS:
        freeze(getattr(pipeline, component), result.schemes[component])
    for name, (x, simulated) in seen.items():  # each on its own input: random weights amplify one code that rounds otherwise
        component, _, layer = name.partition(".")
        deployed = getattr(pipeline, component).get_submodule(layer)(x)
        assert (deployed - simulated).abs().max() < 2e-6 * simulated.abs().max(), name
    pipeline.save_pretrained(tmp_path / "model")
    loaded = QArtSRPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(picture(loaded), picture(pipeline))


@pytest.fixture(scope="module")
def untrained():
    """Layers as training finds them; not to be changed."""
    return dict(all_layers(calibrated(small_recipe("steps=0"))[0]))


def test_only_what_a_stage_names_is_trained(untrained):
    recipe = small_recipe("steps=3", "stages.0.share=0", "stages.1.share=1", "stages.1.train=[adapter]")
    end = all_layers(calibrated(recipe)[0])
    changed = {
        name
        for layer_name, layer in end.items()
        for name, parameter in layer.named_parameters(recurse=False)
        if not torch.equal(parameter, untrained[layer_name].get_parameter(name))
    }
    assert changed == {"adapter_up", "adapter_down"}


def test_biases_are_trained_and_stored(untrained):
    pipeline, result = calibrated(small_recipe("steps=3", "stages.0.share=0", "stages.1.share=1", "stages.1.train=[bias]"))
    wanted = {}
    for name, layer in all_layers(pipeline).items():
        if layer.bias is not None:
            assert layer.bias_change.abs().max() > 0 and torch.equal(layer.bias, untrained[name].bias), name
            wanted[name] = layer.bias + layer.bias_change.detach()
    assert len(wanted) > 10
    for component in COMPONENTS:
        freeze(getattr(pipeline, component), result.schemes[component])
    for name, bias in wanted.items():
        component, _, path = name.partition(".")
        assert torch.equal(getattr(pipeline, component).get_submodule(path).bias, bias), name


def test_a_stage_trains_the_layers_that_it_names(untrained):
    recipe = small_recipe("steps=3", "stages.0.share=0", "stages.1.share=1", "stages.1.layers=vae.decoder.*")
    for name, layer in all_layers(calibrated(recipe)[0]).items():
        changed = any(not torch.equal(p, untrained[name].get_parameter(key)) for key, p in layer.named_parameters(recurse=False))
        assert changed == name.startswith("vae.decoder."), name


def test_turns_without_a_trained_layer_leave_their_steps_to_the_others(untrained):
    """Reversed, the first modules are of the VAE's decoder: nothing of them is trained here."""
    recipe = small_recipe("steps=4", "stages.0.share=1", "stages.1.share=0", "stages.0.layers=unet.*")
    pipeline, result = calibrated(recipe)
    assert len(result.losses["RPQ"]) == 4 and all(turn["module"].startswith("unet") for turn in result.turns)
    for name, layer in all_layers(pipeline).items():
        if not name.startswith("unet."):
            parameters = dict(layer.named_parameters(recurse=False))
            assert all(torch.equal(p, untrained[name].get_parameter(key)) for key, p in parameters.items()), name
    with pytest.raises(ValueError, match="trains smoothing.* of the layers 'transformer.*', and there are none: .* unet.conv_in"):
        calibrated(small_recipe("steps=4", "stages.0.layers=transformer.*"))


def test_layers_have_the_ranks_that_patterns_give_them():
    ranks = "layer.branch_ranks={'vae.*conv_shortcut': 0, 'vae.*': 1}"
    for more in ([], ["layer.branch_budget=0.05"]):
        pipeline, _ = calibrated(small_recipe("steps=0", ranks, *more))
        for name, layer in all_layers(pipeline).items():
            if name.startswith("vae.") and layer.layer_scheme.weight_bits == 4:
                assert layer.layer_scheme.rank == (0 if name.endswith("conv_shortcut") else 1), name
    with pytest.raises(RecipeError, match="branch_ranks.vae.. is -1"):
        small_recipe("layer.branch_ranks={'vae.*': -1}")


class Interrupting(SmoothPatches):
    """Asks the run to stop while it draws the patches of a given call."""

    def __init__(self, call: int):
        self.left = call

    def sample(self, *arguments):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().sample(*arguments)


@pytest.fixture(scope="module")
def straight_run():
    """A recipe, and the pipeline and result of a run that nothing stopped."""
    recipe = small_recipe("steps=10", "stages.0.share=0.7", "stages.1.share=0.3")
    return recipe, *calibrated(recipe)


@pytest.mark.parametrize(
    "call", [2, pytest.param(6, marks=pytest.mark.slow)]
)  # while module inputs are recorded, in the end-to-end stage
def test_a_stopped_run_continues_to_the_same_parameters_bit_for_bit(straight_run, tmp_path, call):
    recipe, straight, whole = straight_run
    state = tmp_path / "state.pt"
    assert calibrated(recipe, state=state, patches=Interrupting(call))[1].stopped
    resumed, result = calibrated(recipe, state=state)
    assert not result.stopped and result.losses == whole.losses and result.turns == whole.turns
    for (name, a), b in zip(all_layers(straight).items(), all_layers(resumed).values(), strict=True):
        for (key, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
            assert torch.equal(x, y), f"{name}.{key}"


@pytest.mark.slow
@pytest.mark.parametrize("others", ["quantized_so_far", "full_precision"])
def test_it_continues_in_a_turn_behind_those_that_train_nothing(tmp_path, others):
    only = ["stages.0.layers=unet.*mid_block*", f"stages.0.others={others}"]
    recipe = small_recipe("steps=8", "stages.0.share=1", "stages.1.share=0", *only)
    whole, state = calibrated(recipe)[1], tmp_path / "state.pt"
    assert calibrated(recipe, state=state, stop_after=3)[1].stopped
    result = calibrated(recipe, state=state)[1]
    assert result.losses == whole.losses and result.turns == whole.turns and len(whole.losses["RPQ"]) == 8


def test_a_finished_run_has_nothing_left_to_train(tmp_path, monkeypatch):
    """The first stage here has no steps, and none of its own saved states."""
    recipe, state = small_recipe("steps=3", "stages.0.share=0", "stages.1.share=1"), tmp_path / "state.pt"
    losses_ = calibrated(recipe, state=state)[1].losses
    monkeypatch.setattr(steps.Training, "_step", lambda *_: pytest.fail("a step is made again"))
    assert calibrated(recipe, state=state)[1].losses == losses_


@pytest.mark.slow
def test_a_kill_between_two_saves_loses_only_the_steps_since(tmp_path):
    recipe = small_recipe("steps=30", "stages.0.share=0.8", "stages.1.share=0.2")
    state = tmp_path / "state.pt"
    straight = calibrated(recipe)[1]

    class Killed(SmoothPatches):
        calls = itertools.count(1)

        def sample(self, *arguments):
            if next(self.calls) == 6:
                raise SystemExit("killed")
            return super().sample(*arguments)

    with pytest.raises(SystemExit):
        calibrated(recipe, state=state, every=7, patches=Killed())
    assert calibrated(recipe, state=state, every=7)[1].losses == straight.losses


def test_a_state_of_another_run_is_refused_by_name(tmp_path):
    state = tmp_path / "state.pt"
    calibrated(small_recipe("steps=0"), state=state)
    with pytest.raises(ValueError, match="with other bits"):
        calibrated(small_recipe("steps=0"), (3, 3), state=state)
    with pytest.raises(ValueError, match="with other data"):
        calibrated(small_recipe("steps=0"), state=state, data={"count": 1, "sha256": "other photographs"})
    state.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="state.pt cannot be read"):
        calibrated(small_recipe("steps=0"), state=state)


def test_a_run_starts_from_another_ones_parameters_if_they_fit(tmp_path):
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    pipeline = calibrated(small_recipe("steps=3"), state=first)[0]
    again, result = calibrated(small_recipe("steps=0"), (3, 3), state=second, start=first)
    assert result.start["bits"] == [4, 4]
    for a, b in zip(all_layers(pipeline).values(), all_layers(again).values(), strict=True):
        assert torch.equal(a.log_smooth, b.log_smooth) and torch.equal(a.input_upper, b.input_upper)
    with pytest.raises(ValueError, match="use that run's ranks"):
        calibrated(small_recipe("steps=0", "layer.adapter_rank=3"), start=first)
    with pytest.raises(ValueError, match="missing.pt cannot be read"):
        calibrated(small_recipe("steps=0"), start=tmp_path / "missing.pt")


class NoGradient(torch.autograd.Function):
    """The number itself, whose gradient is NaN."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize(
    ("spoilt", "said"), [(lambda loss: loss * float("nan"), "the loss is nan"), (NoGradient.apply, "a gradient is not finite")]
)
def test_a_loss_or_gradient_that_is_no_number_stops_with_the_way_out(tmp_path, monkeypatch, spoilt, said: str):
    recipe = small_recipe("steps=4", "stages.0.share=0", "stages.1.share=1")

    def diverging(*arguments):
        loss = end_to_end_loss(*arguments)
        return spoilt(loss) if next(calls) == 3 else loss

    calls, end_to_end_loss = itertools.count(1), stages.end_to_end_loss
    monkeypatch.setattr(stages, "end_to_end_loss", diverging)
    with pytest.raises(FloatingPointError, match=f"step 2 of ET.*{said}.* smaller learning rate than 0.002"):
        calibrated(recipe, state=tmp_path / "state.pt", every=1)
    monkeypatch.undo()
    assert not calibrated(recipe, state=tmp_path / "state.pt", every=1)[1].stopped  # what was saved before it is whole


def test_a_network_that_gives_nan_while_it_is_trained_advises_a_smaller_rate(monkeypatch):
    """The pipeline's own advice, to load it anew or to try another image, is for users of a finished model."""
    recipe = small_recipe("steps=4", "stages.0.share=0", "stages.1.share=1", "stages.1.lr=1e30")
    with pytest.raises(FloatingPointError, match="step 1 of ET.* smaller learning rate than 1e[+]30 .stages.1.lr") as raised:
        calibrated(recipe)
    assert "load the pipeline anew" not in str(raised.value)


def test_orders_of_modules():
    blocks = family_of(pipeline := prepared()).blocks(pipeline)
    names = [turn.name for turn in turns(blocks, "blocks", "forward")]
    assert names[0] == "vae.encoder.conv_in" and names[-1] == "vae.decoder.conv_out"
    assert [turn.name for turn in turns(blocks, "blocks", "reversed")] == names[::-1]
    assert [turn.name for turn in turns(blocks, "parts", "reversed")] == ["decoder", "unet", "encoder"]
    assert distributed(7) == [3, 1, 5, 0, 2, 4, 6]


def test_every_quantized_layer_is_in_one_block():
    pipeline = prepared()
    inside = [id(layer) for block in family_of(pipeline).blocks(pipeline) for layer in block.layers]
    running = {id(layer) for name, layer in all_layers(pipeline).items() if "time_emb" not in name}
    assert len(set(inside)) == len(inside) and running <= set(inside)


def test_replayed_blocks_give_the_same_picture_and_gradient_as_running_them():
    context = context_of(small_recipe())
    pipeline = prepared(context.pipeline)
    blocks = context.family.blocks(pipeline)
    plan = StagePlan(0, context.recipe.stages[0], [], [])
    with TensorStore(limit=20_000) as store:  # most of it goes to disk
        recording = record(context, blocks, plan, 1, store)
        assert store.folder is not None and any(store.folder.iterdir())
        up = recording.batches[0]
        for turn in turns(blocks, "blocks", "reversed")[::5]:
            for block in blocks:
                block.quantize(False)
            turn.blocks[0].quantize(True)
            parameter = turn.blocks[0].layers[0].log_smooth.requires_grad_(True)
            wanted = image_of(pipeline, up)
            (gradient,) = torch.autograd.grad(wanted.square().sum(), parameter)
            with recording.replayed(0, turn.blocks[0]):
                got = image_of(pipeline, up)
                (replayed,) = torch.autograd.grad(got.square().sum(), parameter)
            torch.testing.assert_close(got, wanted)
            torch.testing.assert_close(replayed, gradient, rtol=1e-4, atol=1e-4)
            assert "forward" not in vars(blocks[0].module)
    assert store.folder is None or not store.folder.exists()


def test_perceptual_loss_is_required_by_name_and_sees_differences():
    with pytest.raises(ValueError, match="perceptual loss"):
        calibrated(small_recipe("steps=2", "stages.1.loss={perceptual: 1.0}"))
    loss = EncoderFeatures(build_tiny_pipeline().vae)
    a = SmoothPatches().sample(2, 32, np.random.default_rng(0)) * 2 - 1
    assert float(loss(a, a).detach()) == 0
    near, far = (float(loss(a + torch.randn_like(a) * size, a).detach()) for size in (0.01, 0.2))
    assert 0 < near < far


def test_bounds_that_crossed_zero_are_put_back():
    layers = list(all_layers(prepared()).values())
    with torch.no_grad():
        layers[0].input_lower.fill_(0.5)
        layers[0].weight_upper.fill_(-0.5)
    keep_zero_inside(layers)
    assert layers[0].input_lower == 0 and (layers[0].weight_upper == 0).all() and layers[0].input_upper == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stages.0.lr=fast", "lr is 'fast'"),
        ("layer.bounds=min", "layer.bounds is 'min', expected one of minmax"),
        ("layer.branch_rank=0", "trains branch, which layer does not have"),
        ("layer.adapter_rank=0", "trains adapter, which layer does not have"),
        ("stages.0.rate=1", "no such key"),
        ("keep.unet.conv_in=w5a8", "keep.unet.conv_in: weight_bits is 5"),
        ("stages.0.share=-1", "share is -1"),
        ("stages.0.loss={image_l2: 0, module_l2: 0}", "loss has only weights of 0"),
        ("layer.branch_ranks.unet.*=-1", "branch_ranks.unet.. is -1"),
    ],
)
def test_recipe_values_that_cannot_be_are_named(change, said):
    with pytest.raises(RecipeError, match=said):
        small_recipe("layer.branch_fit=false", change)


def test_steps_need_a_stage_with_a_share():
    with pytest.raises(RecipeError, match="steps is 5, but all stages have a share of 0"):
        small_recipe("steps=5", "stages.0.share=0", "stages.1.share=0")


def test_a_run_that_starts_again_with_another_learning_rate_ends_as_a_new_one(tmp_path):
    slow, fast = (small_recipe("steps=4", f"stages.1.lr={lr}") for lr in (0.001, 0.01))
    stop_after = []
    contexts = [context_of(slow, progress=Callbacks(lambda step, *_: [step] == stop_after)), context_of(fast)]
    run = begin(contexts[0])
    parameters = run.parameters()
    first = run.complete()
    run.start_again(fast, parameters, tmp_path / "state.pt")
    second = run.complete()
    alone = begin(contexts[1]).complete()
    assert second.losses == alone.losses != first.losses
    assert second.layer_errors == alone.layer_errors and second.errors_before == alone.errors_before
    assert torch.equal(picture(contexts[0].pipeline), picture(contexts[1].pipeline))
    run.start_again(fast, parameters, tmp_path / "stopped.pt")
    stop_after.append(2)
    assert run.complete().stopped
    stop_after.clear()
    run.start_again(fast, parameters, tmp_path / "stopped.pt")  # where it was stopped
    assert run.complete().losses == alone.losses
    with pytest.raises(ValueError, match="starts again with other steps and learning rates only"):
        run.start_again(small_recipe("layer.branch_rank=3"), parameters, None)
