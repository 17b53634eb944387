"""Calls that run at the same time, fail, or are interrupted: right images, and a pipeline that is as it was before."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qartsr_pipeline.calls import Access, access_to, all_modules, alone_where_needed
from qartsr_pipeline.forwards import exchanged_forwards, other_forward, own_forward
from tiny_models import build_tiny_pipeline

SCENE = np.random.default_rng(0).random((24, 32, 3)).astype(np.float32)
KINDS = ({"tile_size": 64}, {"tile_size": 96, "color_fix": None}, {}, {"tile_size": 64, "output_type": "latent"})


def scene(number):
    return SCENE * (0.2 + 0.1 * number)


def enlarge(pipe, number):
    images = pipe(scene(number), **{"output_type": "np", **KINDS[number % len(KINDS)]}).images
    return np.asarray(images)


def together(pipe, count, enlarge=enlarge):
    barrier = threading.Barrier(count)

    def work(number):
        barrier.wait()
        return enlarge(pipe, number)

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(work, range(count)))


def state(pipe):
    """All that a call could leave behind: attributes, hooks and tensors of every module, and the pipeline's own attributes."""
    found = {"pipeline": {name: id(value) for name, value in vars(pipe).items()}}
    for part, model in pipe.components.items():
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            kept = {}
            for key, value in vars(module).items():
                inner = tuple((k, id(v)) for k, v in value.items()) if isinstance(value, dict) else None
                kept[key] = (id(value), inner)
            tensors = (*module._parameters.items(), *module._buffers.items())
            kept["tensors"] = [(n, t.data_ptr(), t.dtype, t.device, t._version) for n, t in tensors if t is not None]
            found[part, name] = kept
    return found


@pytest.fixture(scope="module")
def pipe():
    """Shared by tests: each leaves it as it was, which is what they are about."""
    return build_tiny_pipeline()


def test_eight_threads_get_eight_right_images(pipe):
    alone = [enlarge(pipe, number) for number in range(8)]
    before = state(pipe)
    assert all(np.array_equal(*pair) for pair in zip(together(pipe, 8), alone, strict=True))
    assert state(pipe) == before
    assert np.array_equal(enlarge(pipe, 2), alone[2])


def test_threads_share_an_offloaded_pipeline():
    pipe = build_tiny_pipeline()
    alone = [enlarge(pipe, number) for number in range(3)]
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(np.array_equal(*pair) for pair in zip(together(pipe, 3), alone, strict=True))


def test_threads_share_a_pipeline_that_is_run_in_a_wider_dtype(caplog):
    """float16 on a CPU; what overflows goes the same way."""
    pipe = build_tiny_pipeline().to(torch.float16)
    alone = [enlarge(copy.deepcopy(pipe), number) for number in range(3)]
    before = state(pipe)
    caplog.clear()
    assert all(np.array_equal(*pair) for pair in zip(together(pipe, 3), alone, strict=True))
    assert state(pipe) == before
    assert caplog.text.count("Computing in float32 instead of float16") == 1


def test_each_thread_sees_its_own_tiles(pipe):
    seen, both = {}, threading.Barrier(2)

    def enlarge(pipe, number):
        def callback(pipe, step, timestep, tensors):
            if step == 0:
                both.wait()
            tile, grid = pipe.current_tile
            seen.setdefault(number, []).append((step, tile == list(grid)[step], pipe.num_timesteps))

        return pipe(scene(number), tile_size=(64, 96)[number], callback_on_step_end=callback)

    together(pipe, 2, enlarge)
    for steps in seen.values():
        assert [(step, True, len(steps)) for step in range(len(steps))] == steps
    assert len(seen[0]) > len(seen[1]) > 1


class Stopped(BaseException):
    """As KeyboardInterrupt is: no Exception."""


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 600), st.sampled_from([0, 1, 3]), st.sampled_from([Stopped, RuntimeError]))
def test_a_call_that_is_stopped_anywhere_leaves_everything_as_it_was(pipe, moment, kind, error):
    before, count = state(pipe), 0

    def stop(module, inputs):
        nonlocal count
        count += 1
        if count > moment:
            raise error("stopped")

    hook = nn.modules.module.register_module_forward_pre_hook(stop)
    try:
        enlarge(pipe, kind)
    except error:
        pass
    finally:
        hook.remove()
    assert state(pipe) == before


def test_an_image_that_a_callback_enlarges_has_nothing_of_the_outer_one(pipe):
    inner = []

    def enlarge_another(pipe, step, timestep, tensors):
        inner.append(enlarge(pipe, 2))

    pipe(scene(7), tile_size=64, callback_on_step_end=enlarge_another)
    assert len(inner) > 1 and all(np.array_equal(one, enlarge(pipe, 2)) for one in inner)


def test_offloaded_pipelines_may_call_each_other_in_callbacks():
    """From two threads, each of which has one pipeline when it calls the other."""
    pipes = [build_tiny_pipeline(seed=seed) for seed in (0, 1)]
    alone = [enlarge(pipe, 0) for pipe in pipes]
    for pipe in pipes:
        pipe.enable_model_cpu_offload(device="cpu")
    barrier = threading.Barrier(2)

    def work(number):
        own, other, inner = pipes[number], pipes[1 - number], []

        def call_the_other(pipe, step, timestep, tensors):
            if step == 0:
                barrier.wait(30)
            if step < 2:
                inner.append(enlarge(other, 0))

        images = own(scene(0), **KINDS[0], output_type="np", callback_on_step_end=call_the_other).images
        return [images, *inner]

    def all_of(number, results):
        results[number] = work(number)

    results: dict[int, list] = {}
    threads = [threading.Thread(target=all_of, args=(number, results), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 2, "each waits for the other"
    for number, (images, *inner) in results.items():
        assert np.array_equal(images, alone[number]) and len(inner) == 2
        assert all(np.array_equal(one, alone[1 - number]) for one in inner)
    assert all(np.array_equal(enlarge(pipe, 0), before) for pipe, before in zip(pipes, alone, strict=True))


def test_a_callback_that_fails_leaves_everything_as_it_was(pipe):
    before = state(pipe)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(scene(1), tile_size=64, callback_on_step_end=fail)
    assert state(pipe) == before


def test_an_interrupted_call_ends_with_what_is_done(pipe, caplog):
    def stop_after_two(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        assert pipe.interrupt == (step == 1)

    whole = pipe(scene(3), tile_size=64, tile_overlap=0, color_fix=None, output_type="np").images[0]
    part = pipe(
        scene(3), tile_size=64, tile_overlap=0, color_fix=None, output_type="np", callback_on_step_end=stop_after_two
    ).images[0]
    bicubic = nn.functional.interpolate(
        torch.from_numpy(scene(3)).permute(2, 0, 1)[None], scale_factor=4, mode="bicubic", antialias=True
    )
    bicubic = bicubic[0].permute(1, 2, 0).clamp(0, 1).numpy()
    assert np.array_equal(part[:48], whole[:48]) and np.abs(part[48:] - bicubic[48:]).max() < 1e-5
    assert "interrupted after 2 of" in caplog.text
    again = pipe(scene(3), tile_size=64, tile_overlap=0, color_fix=None, output_type="np").images[0]
    assert np.array_equal(again, whole), "the next call is not interrupted"


def test_another_thread_interrupts_all_calls(pipe):
    started, go_on = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, tensors):
        started.set()
        assert step == 0 and go_on.wait(60)

    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(pipe, scene(0), tile_size=64, callback_on_step_end=wait)
        assert started.wait(60)
        assert pipe.num_timesteps > 1, "a thread without a call sees the one that began last"
        pipe._interrupt = True
        go_on.set()
        assert job.result(60).images


JUNK = [
    ([1], TypeError, "must return None or a dict.*list"),
    ({"image": "junk"}, TypeError, "'image' as a tensor.*str"),
    ({"image": None}, TypeError, "'image' as a tensor.*NoneType"),
    ({"image": torch.zeros(1, 3, 2, 2)}, ValueError, r"shape \(1, 3, 128, 128\).*\(1, 3, 2, 2\)"),
    ({"image": torch.zeros(1, 3, 128, 128, dtype=torch.uint8)}, ValueError, "float tensor.*uint8"),
    ({"image": torch.zeros(1, 3, 128, 128, device="meta")}, ValueError, "dense.*meta"),
    ({"image": torch.zeros(1, 3, 128, 128).to_sparse()}, ValueError, "dense.*sparse"),
    ({"image": torch.full((1, 3, 128, 128), torch.nan)}, ValueError, "NaN or infinity in 'image'"),
    ({"latents": torch.full((1, 4, 64, 64), torch.inf)}, ValueError, "NaN or infinity in 'latents'"),
]


@pytest.mark.parametrize("returned, error, message", JUNK)
def test_what_a_callback_returns_is_checked(pipe, returned, error, message):
    with pytest.raises(error, match=f"`callback_on_step_end`.*{message}"):
        pipe(scene(0), callback_on_step_end=lambda *_: returned)


def test_what_a_callback_spoils_in_place_is_noticed(pipe):
    def spoil(pipe, step, timestep, tensors):
        tensors["image"][0, 0, 5, 5] = float("nan")

    with pytest.raises(ValueError, match="left NaN or infinity in 'image'"):
        pipe(scene(0), callback_on_step_end=spoil)


def test_an_exchanged_forward_is_that_of_its_context_alone():
    module, x = nn.GroupNorm(1, 2), torch.ones(1, 2, 3, 3)
    with exchanged_forwards([module], lambda module: lambda x: x + 1):
        assert module(x).max() == 2 == own_forward(module)(x).max() and other_forward(module) is not None
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(module, x).result().max() == 0
            assert thread.submit(other_forward, module).result() is None
        with exchanged_forwards([module], lambda module: lambda x: x + 2):
            assert module(x).max() == 3
        assert module(x).max() == 2
    assert "forward" not in vars(module) and module(x).max() == 0


def test_a_compiled_module_computes_what_its_context_says():
    module, x = nn.GroupNorm(1, 2), torch.ones(1, 2, 3, 3)
    compiled = torch.compile(module, backend="eager")
    for added in (1.0, 2.0, 3.0):
        with exchanged_forwards([module], lambda module, added=added: lambda x: x + added):
            assert compiled(x).max() == 1 + added
    assert compiled(x).max() == 0


def test_a_module_is_used_together_or_alone():
    access, inside, order = Access(), threading.Event(), []

    def change():
        with access.alone(), access.together(), access.alone():  # as often as it likes
            inside.set()
            order.append("alone")

    with access.together(), access.together():
        other = threading.Thread(target=change)
        other.start()
        assert not inside.wait(0.05)
        order.append("together")
    other.join(60)
    assert order == ["together", "alone"]
    with access.alone():
        pass


def test_a_call_waits_for_hooks_that_another_takes_off_for_a_moment():
    """At its end a call of an offloaded pipeline does so, and then puts them on again."""
    layer, entered = nn.Linear(2, 2), threading.Event()

    def begin():
        with alone_where_needed([layer]):
            entered.set()

    other = threading.Thread(target=begin)
    with access_to(layer).alone():
        other.start()
        assert not entered.wait(0.1)
    other.join()
    assert entered.is_set()


def test_modules_are_found_in_torchs_order():
    """Also where one stands in two places, or a place is empty."""
    shared = nn.Sequential(nn.ReLU(), nn.ReLU())
    module = nn.Sequential(nn.Sequential(shared, nn.Linear(1, 1)), shared, shared[1], nn.Sequential(nn.Tanh()))
    module.register_module("none", None)
    assert list(all_modules(module)) == list(module.modules())
